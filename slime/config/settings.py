"""The type, default, bounds, unit and help of every setting, read from the schema."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_type_hints

from slime.schema import Config


class ConfigError(ValueError):
    """A user error. The message is one line with the wrong value and the cure."""


@dataclass(frozen=True)
class Bounds:
    """An interval in mathematical notation: [ and ] include the end point, ( and ) exclude it."""

    text: str

    @property
    def ends(self) -> tuple[float, float]:
        low, high = (float(end) for end in self.text[1:-1].split(","))
        return low, high

    def cure(self, value: float) -> str:
        """Return the cure for a number outside the interval, or "" for a number inside it."""
        low, high = self.ends
        above = value > low or (self.text[0] == "[" and value == low)
        below = value < high or (self.text[-1] == "]" and value == high)
        if above and below:
            return ""
        wrong_end, end = (self.text[0], low) if not above else (self.text[-1], high)
        if math.isinf(end) or math.isnan(value):
            return "use a finite number"
        if wrong_end in "[]":
            return f"the nearest that works is {end:.10g}"
        return f"use a number {'above' if not above else 'below'} {end:.10g}"


@dataclass(frozen=True)
class Setting:
    """A key with a value."""

    key: str
    kind: Any  # its type
    default: Any
    help: str
    bounds: Bounds | None
    unit: str


@dataclass(frozen=True)
class Section:
    """A key that contains other keys; "" for the whole configuration."""

    key: str
    kind: type
    help: str  # first line of its docstring
    settings: tuple[Setting, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Return every section in the schema's order, each before the ones inside it."""
    return tuple(_sections("", Config()))


@cache
def settings() -> dict[str, Setting]:
    """Return every setting by its dotted key."""
    return {setting.key: setting for section in sections() for setting in section.settings}


def hints(kind: Any) -> dict[str, Any]:
    """Return the keys of a section with their types, or {} if `kind` is not a section."""
    return get_type_hints(kind) if is_dataclass(kind) else {}


def _sections(key: str, section: Any) -> Iterator[Section]:
    prefix, kinds = f"{key}." if key else "", hints(type(section))
    values = [(one, getattr(section, one.name)) for one in fields(section)]
    filled = type(section)()
    own = [
        # Values that `__post_init__` derives keep the plain default; a section may override its class's default.
        _setting(prefix, one, kinds[one.name], _plain(one) if value == getattr(filled, one.name) else value)
        for one, value in values
        if not is_dataclass(value)
    ]
    yield Section(key, type(section), (type(section).__doc__ or "").splitlines()[0], tuple(own))
    for one, value in values:
        if is_dataclass(value):
            yield from _sections(prefix + one.name, value)


def _plain(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _setting(prefix: str, one: Field[Any], kind: Any, default: Any) -> Setting:
    told = one.metadata
    bounds = Bounds(told["bounds"]) if told.get("bounds") else None
    return Setting(prefix + one.name, kind, default, told.get("help", ""), bounds, told.get("unit", ""))


def as_text(value: Any) -> str:
    """Return a value in the notation of YAML and of the command line."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "''" if value == "" else str(value)
