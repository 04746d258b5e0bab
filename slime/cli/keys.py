"""Help and completion for recipes, models, clusters and keys. Imports only fast modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from textwrap import shorten

from recipes import catalogue

DESCRIPTION_WIDTH = 72  # typer breaks longer ones into lines, which shells do not expect
USAGE = """\
Usage: slime {command} recipe=NAME [model=NAME] [cluster=NAME] [key=value ...] [--recipes DIR]
       slime {command} --help KEY

Values: schema < recipe < model < cluster < command line, the later winning key by key.
--recipes DIR: a folder of your own with recipe/, model/ and cluster/ folders of YAML files
(./recipes is found by itself)."""


def overview(command: str, folders: list[Path]) -> str:
    """Return the help of `train` and `config`: names that can be chosen, and sections of keys."""
    from slime.config.settings import as_text, sections

    lines = [USAGE.format(command=command)]
    for group in catalogue.GROUPS:
        known = catalogue.names(folders, group)
        width = max(map(len, known), default=0) + 2
        lines += ["", f"{group}=NAME"]
        for name in known:
            path = catalogue.find(folders, group, name)
            lines.append(f"  {name:<{width}}{catalogue.describe(path) if path else ''}".rstrip())
    lines += ["", "Keys (--help KEY explains one, or those of a section; docs/configuration.md has all)"]
    run, *others = sections()
    shown = [(one.key, f"{as_text(one.default):<14}{one.help}") for one in run.settings if one.key != "recipe"]
    shown += [(f"{one.key}.*", one.help) for one in others]
    width = max(len(key) for key, _ in shown) + 2
    return "\n".join([*lines, *(f"  {key:<{width}}{text}" for key, text in shown)])


def explained(key: str) -> str:
    """Return the help of a key. ConfigError: unknown key, with the nearest."""
    from slime.config.reference import explain

    return explain(key)


def complete(before: Sequence[str], incomplete: str) -> list[tuple[str, str]]:
    """Return the completions, each with a description: names of groups, keys, and values of keys with choices.

    bash hands over `policy.loss=d` as three words, `policy.loss`, `=` and `d`, and takes the value alone.
    """
    head = f"{before[-2]}=" if len(before) > 1 and before[-1] == "=" else ""
    word = head + incomplete
    fitting = [(text, told) for text, told in _candidates("=" in word) if text.startswith(word)]
    return [(text.removeprefix(head), shorten(told, DESCRIPTION_WIDTH)) for text, told in fitting]


def _candidates(with_values: bool) -> Iterator[tuple[str, str]]:
    from slime.config.settings import settings

    folders = catalogue.search_path()
    for group in catalogue.GROUPS:
        for name in catalogue.names(folders, group):
            path = catalogue.find(folders, group, name)
            yield f"{group}={name}", catalogue.describe(path) if path else ""
    for key, one in settings().items():
        choices: list[str] = []
        if isinstance(one.kind, type) and issubclass(one.kind, Enum):
            choices = [str(choice.value) for choice in one.kind]
        elif one.kind is bool:
            choices = ["true", "false"]
        if with_values:
            yield from ((f"{key}={choice}", one.help) for choice in choices)
        elif key not in catalogue.GROUPS:
            yield f"{key}=", one.help
