"""The schema's dotted keys: their types, and suggestions for unknown keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from difflib import SequenceMatcher
from enum import Enum
from typing import Any, get_args, get_origin

from slime.config.settings import ConfigError, hints, settings
from slime.schema import Config

MAPPINGS = tuple(
    key for key, one in settings().items() if get_origin(one.kind) is dict
)  # the schema does not define the keys below these
CLOSE = 0.75  # similarity (0 to 1) from which one word counts as a misspelling of another
MOST = 4  # number of suggestions if no key is similar and several contain the word
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}


def hint(key: str) -> Any:
    """Return the type of a dotted key, or Any below a mapping.

    ConfigError: the key is unknown; the message suggests the nearest one.
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
    """Return the key of the mapping that a dotted key names or is inside of, or ""."""
    return next((one for one in MAPPINGS if f"{key}.".startswith(f"{one}.")), "")


def all_keys(kind: Any = Config, prefix: str = "") -> list[str]:
    """Return the dotted keys of all sections and settings, in the schema's order."""
    keys = []
    for name, of in hints(kind).items():
        keys.append(prefix + name)
        if is_dataclass(of):
            keys += all_keys(of, f"{prefix}{name}.")
    return keys


def _unknown_key(key: str, section: str) -> str:
    """Return the message for an unknown key, with the nearest key or else the keys of its section."""
    inside = hints(hint(section) if section else Config)
    near = nearest(key, [known for known in all_keys() if not is_dataclass(hint(known))]) if inside else [section]
    if near:
        return f"unknown key {key!r}; did you mean {' or '.join(map(repr, near))}?"
    prefix = f"{section}." if section else ""
    known = [f"{prefix}{name}{'.*' if is_dataclass(of) else ''}" for name, of in inside.items()]
    return f"unknown key {key!r}; known: {', '.join(known)}"


def expected(of: Any) -> str:
    """Describe the valid values of a type."""
    if isinstance(of, type) and issubclass(of, Enum):
        return f"must be one of {', '.join(member.value for member in of)}"
    if get_origin(of) is list:
        (each,) = get_args(of)
        return f"must be a list, each of it {_TYPE_NAMES[each]}: [x,y]"
    return f"must be {_TYPE_NAMES.get(of, 'a mapping')}"


def nearest(key: str, keys: Sequence[str]) -> list[str]:
    """Return the key that was probably meant, or several candidates, or [] if no key is similar.

    The last component counts most: `policy.lr` matches policy.optimizer.lr, although policy.kl has a smaller edit
    distance. Ties are broken by the same top-level section, then by the similarity of the whole section, then by
    length.
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
    """Return the similarity of two words: 1 for equal words, 0 for words without a common letter."""
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def _flat(key: str) -> str:
    return key.replace(".", "_")
