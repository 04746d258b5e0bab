"""The help texts of keys: `slime train --help KEY`, and docs/configuration.md, which this module generates:

.venv/bin/python -m slime.config.reference
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import get_args, get_origin

from slime.config.keys import MAPPINGS, hint, mapping_of
from slime.config.settings import Section, Setting, as_text, sections, settings

PAGE = "docs/configuration.md"
HEAD = """\
# Configuration

This page lists every key with its default. `slime config recipe=NAME` shows the values of a run and their origins, and
`slime train --help KEY` explains a key or the keys of a section. Sources of values: schema < recipe < model < cluster <
command line. For each key, later sources override earlier ones.

In an interval, `[` and `]` include the end point, and `(` and `)` exclude it. Do not edit this page: it is generated
from the fields of the `config.py` files by `.venv/bin/python -m slime.config.reference`.
"""
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}


def explain(key: str) -> str:
    """Return the help of a key, or of a section and its keys.

    ConfigError: the key is unknown; the message suggests the nearest one.
    """
    hint(key)
    key = mapping_of(key) or key
    if key in settings():
        one = settings()[key]
        more = [f"  {(one.kind.__doc__ or '').strip()}"] if _choices(one) else []
        return "\n".join([f"{key}: {values(one)}; default {as_text(one.default)}", f"  {one.help}", *more])
    lines = []
    for section in sections():
        if f"{section.key}.".startswith(f"{key}."):
            lines += [f"{section.key}: {section.help}"]
            width = max((len(one.key) for one in section.settings), default=0) + 2
            lines += [f"  {one.key:<{width}}{one.help}" for one in section.settings]
    return "\n".join(lines)


def values(one: Setting) -> str:
    """Describe the values of a setting: its type or choices, bounds and unit."""
    if choices := _choices(one):
        return ", ".join(choices)
    if get_origin(one.kind) is list:
        (each,) = get_args(one.kind)
        return "list of numbers" if each is float else "list of text"
    name = "mapping" if one.key in MAPPINGS else _NAMES[one.kind]
    within = f" in {one.bounds.text}" if one.bounds else ""
    return f"{name}{within}{', ' if one.unit else ''}{one.unit}"


def _choices(one: Setting) -> list[str]:
    is_choice = isinstance(one.kind, type) and issubclass(one.kind, Enum)
    return [str(choice.value) for choice in one.kind] if is_choice else []


def page() -> str:
    """Return the text of docs/configuration.md."""
    return "\n".join([HEAD, *_sections()])


def _sections() -> Iterator[str]:
    told: set[type] = set()
    for section in sections():
        alike = [one for one in sections() if one.kind is section.kind]
        if section.kind in told or not section.settings:
            continue
        told.add(section.kind)
        yield f"## {', '.join(f'`{one.key}`' for one in alike)}\n" if section.key else "## The run\n"
        yield f"{section.help}\n"
        yield "| key | default | values | meaning |"
        yield "|---|---|---|---|"
        yield from _rows(alike)
        yield ""


def _rows(alike: list[Section]) -> Iterator[str]:
    """Yield the lines of a table. Sections of one class share it; differing defaults are listed by section."""
    first, *others = alike
    for row, one in enumerate(first.settings):
        default = f"`{as_text(one.default)}`"
        for other in others:
            if other.settings[row].default != one.default:
                default += f"; {other.key}: `{as_text(other.settings[row].default)}`"
        yield f"| `{one.key.rpartition('.')[2]}` | {default} | {values(one)} | {one.help} |"


if __name__ == "__main__":
    Path(PAGE).write_text(page())
