"""`slime train` and `slime config`: compose a configuration, then run it or show it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.environment import expand, forget_other_ray
from recipes import catalogue
from slime.cli.common import Refused, say
from slime.cli.keys import complete, explained, overview

if TYPE_CHECKING:
    from slime.config import Loaded
    from slime.schema import Config
    from slime.start.needs import Preflight

_COMMENT_COLUMN = 48


def _complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    return complete(context.params.get("arguments") or [], incomplete)


Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="recipe=NAME [model=NAME] [cluster=NAME] [key=value ...]",
        help="What to run, and values that win over those of its files.",
        autocompletion=_complete,
    ),
]
Recipes = Annotated[
    str | None,
    typer.Option("--recipes", metavar="DIR", help="Folder with recipe/, model/ and cluster/ folders of YAML files."),
]
Help = Annotated[bool, typer.Option("--help", "-h", help="Show this message, or explain a KEY.")]


def train(arguments: Arguments = None, recipes: Recipes = None, help: Help = False) -> int:
    """Train, or continue from the newest checkpoint."""
    if help:
        return _help("train", arguments or [], recipes)
    loaded, start, found = _loaded(arguments or [], recipes, prepares=False)
    if found.problems:
        raise Refused("; ".join(found.problems))
    return _train(loaded.config, start, found.warnings)


def config(arguments: Arguments = None, recipes: Recipes = None, help: Help = False) -> int:
    """Show every value, and whether it can run here."""
    if help:
        return _help("config", arguments or [], recipes)
    loaded, _, found = _loaded(arguments or [], recipes, prepares=True)
    _show(loaded, found.problems)
    return 0


def _help(command: str, arguments: list[str], recipes: str | None) -> int:
    keys = [argument for argument in arguments if "=" not in argument]
    try:
        folders = catalogue.search_path(folder_of_recipes(recipes))
        say("\n".join(map(explained, keys)) if keys else overview(command, folders))
    except ValueError as error:
        raise Refused(str(error)) from error
    return 0


def compose(arguments: list[str], recipes: str | None) -> Config:
    """Compose and check a configuration for other machines than this one. Refused: see `checked`, or a file is
    missing.
    """
    loaded, _, absent = checked(arguments, recipes)
    if absent:
        raise Refused("; ".join(absent))
    return loaded.config


def checked(arguments: list[str], recipes: str | None) -> tuple[Loaded, Config | None, list[str]]:
    """Return the checked configuration, that of its warm start, and the files that are missing here. Refused: see
    `ConfigError`.
    """
    from slime.config import load, load_start, missing

    try:
        folder = folder_of_recipes(recipes)
        catalogue.search_path(folder)
        loaded = load(arguments, folder)
        return loaded, load_start(loaded, folder), missing(loaded.config)
    except ValueError as error:  # ConfigError is one
        raise Refused(str(error)) from error


def _loaded(arguments: list[str], recipes: str | None, prepares: bool) -> tuple[Loaded, Config | None, Preflight]:
    """Compose and check, including the warm start and this machine. `prepares`: as `train` does
    later, make rows and models. Refused: see `ConfigError`.
    """
    loaded, start, absent = checked(arguments, recipes)

    from slime.config import ConfigError
    from slime.start.needs import Preflight, preflight
    from slime.start.prepare import prepare

    try:
        if prepares and not absent:
            prepare(loaded.config, start)
    except ConfigError as error:
        raise Refused(str(error)) from error
    found = preflight(loaded.config)
    return loaded, start, Preflight((*absent, *found.problems), found.warnings)


def folder_of_recipes(recipes: str | None) -> Path | None:
    """Return the value of --recipes as a path. ValueError: see `expand`."""
    return Path(expand(recipes)) if recipes else None


def _train(config: Config, start: Config | None, warnings: Sequence[str]) -> int:
    if not config.cluster.ray_address:
        forget_other_ray()

    from launch.lock import LockError
    from launch.nodes import NodeError
    from launch.supervisor import TO_BE_CONTINUED, ignore_signals
    from slime.config import ConfigError
    from slime.observe.failures import Failures
    from slime.schema import folder_of

    with Failures(folder_of(config) / "logs", (ConfigError, LockError, NodeError)) as failures:
        from slime.train import main as run  # takes seconds to import

        run(config, start, failures, warnings)
    if failures.exit_code >= TO_BE_CONTINUED:  # by a signal
        ignore_signals()
    return failures.exit_code


def _show(loaded: Loaded, against: Sequence[str]) -> None:
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")
    shown = [
        f"{text:<{_COMMENT_COLUMN}}  {dim}# {origin}{plain}" if origin else text
        for text, origin in _lines(loaded.config, loaded.origins)
    ]
    shown += ["", "this machine can not run it:" if against else "this machine can run it"]
    say("\n".join([*shown, *(f"  {reason}" for reason in against)]))


def _lines(node: Any, origins: dict[str, str], prefix: str = "", indent: str = "") -> list[tuple[str, str]]:
    """Return (text, origin) of each line. A section's own line has no origin; a derived property can't be set."""
    from slime.config.settings import as_text

    lines: list[tuple[str, str]] = []
    items = node.items() if isinstance(node, dict) else ((f.name, getattr(node, f.name)) for f in fields(node))
    for name, value in items:
        key = f"{prefix}{name}"
        if is_dataclass(value) or (isinstance(value, dict) and value):
            lines.append((f"{indent}{name}:", ""))
            lines += _lines(value, origins, f"{key}.", indent + "  ")
        else:
            lines.append((f"{indent}{name}: {as_text(value)}", origins.get(key, "default")))
    for kind in reversed(type(node).__mro__):  # inherited ones first, as fields are
        for name, attribute in vars(kind).items():
            if isinstance(attribute, property):
                lines.append((f"{indent}({name}: {as_text(getattr(node, name))})", "derived"))
    return lines
