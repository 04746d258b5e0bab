"""The schema's dotted keys: their types, and the nearest one to a key that does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from difflib import SequenceMatcher
from enum import Enum
from typing import Any, get_args, get_origin

from slime.config.settings import ConfigError, hints, settings
from slime.schema import Config

MAPPINGS = tuple(key for key, one in settings().items() if get_origin(one.kind) is dict)  # keys below are not ours
CLOSE = 0.75  # of 1: so alike are two words of which one may be a slip of the other
MOST = 4  # keys named, where none is near and several have the word in them
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}


def hint(key: str) -> Any:
    """Return the type that the schema gives a dotted key; Any below a mapping. ConfigError: unknown key, with the
    nearest.
    """
    if mapping_of(key) not in ("", key):
        return Any
    kind: Any = Config
    for depth, name in enumerate(key.split(".")):
        inside = hints(kind)
        if name not in inside:
            raise ConfigError(_unknown_key(key, ".".join(key.split(".")[:depth])))
        kind = inside[name]
    return kind


def mapping_of(key: str) -> str:
    """Return the mapping that a dotted key is, or lies in; "" for none."""
    return next((one for one in MAPPINGS if f"{key}.".startswith(f"{one}.")), "")


def all_keys(kind: Any = Config, prefix: str = "") -> list[str]:
    """Return dotted keys of sections and of settings, in the schema's order."""
    keys = []
    for name, of in hints(kind).items():
        keys.append(prefix + name)
        if is_dataclass(of):
            keys += all_keys(of, f"{prefix}{name}.")
    return keys


def _unknown_key(key: str, section: str) -> str:
    """Names the nearest key, else those of its section."""
    inside = hints(hint(section) if section else Config)
    near = nearest(key, [known for known in all_keys() if not is_dataclass(hint(known))]) if inside else [section]
    if near:
        return f"unknown key {key!r}; did you mean {' or '.join(map(repr, near))}?"
    prefix = f"{section}." if section else ""
    known = [f"{prefix}{name}{'.*' if is_dataclass(of) else ''}" for name, of in inside.items()]
    return f"unknown key {key!r}; known: {', '.join(known)}"


def expected(of: Any) -> str:
    """Return what a value of a type looks like."""
    if isinstance(of, type) and issubclass(of, Enum):
        return f"must be one of {', '.join(member.value for member in of)}"
    if get_origin(of) is list:
        (each,) = get_args(of)
        return f"must be a list, each of it {_TYPE_NAMES[each]}: [x,y]"
    return f"must be {_TYPE_NAMES.get(of, 'a mapping')}"


def nearest(key: str, keys: Sequence[str]) -> list[str]:
    """Return the key that was meant, or some of those that may have been; none where nothing is like it.

    The last part counts most: `policy.lr` is policy.optimizer.lr, though policy.kl has fewer letters to change. Of
    equals the one in the same section is nearer, then the one whose whole section is more alike, then the shorter one.
    """
    section, _, last = key.rpartition(".")
    found: list[tuple[tuple[float, ...], str]] = []
    for one in keys:
        of_one, _, name = one.rpartition(".")
        if _alike(last, name) >= CLOSE:
            same_section = _alike(section.partition(".")[0], of_one.partition(".")[0]) >= CLOSE
            found.append(((_alike(last, name) + 0.2 * same_section, _alike(section, of_one), -len(one)), one))
    if found:
        return [max(found, key=lambda pair: pair[0])[1]]
    whole = max(keys, key=lambda one: _alike(_flat(key), _flat(one)))
    if _alike(_flat(key), _flat(whole)) >= CLOSE and _alike(last, whole.rpartition(".")[2]) > 0.5:
        return [whole]
    inside = [one for one in keys if last in one.rpartition(".")[2].split("_")]
    here = [one for one in inside if section and one.startswith(section.partition(".")[0] + ".")]
    return (here or inside)[:MOST]


def _alike(one: str, other: str) -> float:
    """1 for equal words, 0 for words without a common letter."""
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def _flat(key: str) -> str:
    return key.replace(".", "_")
