"""The command line: `slime train`, `slime config`, `slime report`, `slime advise`, `slime export`.

Nothing heavy is imported before it is needed, so that help answers at once. A user's mistake is one line on
stderr and exit code 2.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.environment import expand, forget_other_ray
from recipes import catalogue

if TYPE_CHECKING:
    from slime.config import Loaded

HELP = """\
slime trains language-model agents with reinforcement learning.

  slime train  recipe=NAME [model=NAME] [cluster=NAME] [key=value ...] [--recipes DIR]
               trains; the same command goes on from the newest checkpoint
  slime config recipe=NAME ...   shows every value, where it comes from, and whether this machine can run it
  slime report RUN               makes the report.html of a run again (a name below runs/, or a folder)
  slime advise RUN               critic or group baseline: what the numbers of a run say
  slime export RUN [--step N] --out DIR
               writes the policy of a checkpoint as a Hugging Face folder (without --step: of the newest)

  slime train --help             lists recipes, models, clusters and keys

Example: slime train recipe=ppo_coding steps=20"""

TRAIN_HELP = """\
Usage: slime {command} recipe=NAME [model=NAME] [cluster=NAME] [key=value ...] [--recipes DIR]

Values: schema < recipe < model < cluster < command line, the later winning key by key.
--recipes DIR: a folder of your own with recipe/, model/ and cluster/ folders of YAML files
(./recipes is found by itself)."""
EXPORT_HELP = """\
Usage: slime export RUN [--step N] --out DIR

Writes the policy of a checkpoint as a Hugging Face folder: weights, config, tokenizer. Needs no GPU.
RUN: a name below runs/, or a folder. --step N: of which checkpoint (default: the newest). --out DIR: a new folder."""
_COMMANDS = ("train", "config", "report", "advise", "export")
_COMMENT_COLUMN = 48
_HELP_FLAGS = {"-h", "--help"}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code, with one line on stderr for all but 0.

    0 done, 2 refused, 1 failed, 128 + N stopped by signal N.
    """
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        print("slime: stopped by SIGINT", file=sys.stderr)
        return 130


def _run(command: str, rest: list[str]) -> int:
    if command in {*_HELP_FLAGS, "help"}:
        print(HELP)
        return 0
    if command not in _COMMANDS:
        near = get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(_COMMANDS)}"
        return _refuse(f"unknown command {command!r}; {hint}")
    if command in _OF_A_RUN:
        return _of_a_run(command, rest)
    if command == "export":
        return _export(rest)
    return _compose_and_run(command, rest)


def _compose_and_run(command: str, rest: list[str]) -> int:
    asks_help = bool(_HELP_FLAGS & set(rest))
    try:
        overrides, recipes_dir = _take_recipes([argument for argument in rest if argument not in _HELP_FLAGS])
        folders = catalogue.search_path(recipes_dir)
    except ValueError as error:
        return _refuse(str(error))
    if asks_help:
        print(_train_help(command, folders))
        return 0

    from launch.preflight import problems
    from slime.config import ConfigError, load, load_start, missing
    from slime.start.prepare import prepare

    try:
        loaded = load(overrides, recipes_dir)
        start = load_start(loaded, recipes_dir)
        absent = missing(loaded.config)
        if command == "config" and not absent:
            prepare(loaded.config, start)  # `train` does the same
    except ConfigError as error:
        return _refuse(str(error))
    against = [*absent, *problems(loaded.config.cluster)]
    if command == "config":
        _show(loaded, against)
        return 0
    if against:
        return _refuse("; ".join(against))

    if not loaded.config.cluster.ray_address:
        forget_other_ray()

    from launch.lock import LockError
    from launch.nodes import NodeError
    from launch.supervisor import ignore_signals
    from slime.observe.failures import Failures
    from slime.schema import folder_of

    with Failures(folder_of(loaded.config) / "logs", (ConfigError, LockError, NodeError)) as failures:
        from slime.train import main as run  # takes seconds to import

        run(loaded.config, start, failures)
    if failures.exit_code > 128:  # by a signal
        ignore_signals()
    return failures.exit_code


def _of_a_run(command: str, rest: list[str]) -> int:
    """Commands about a run that exists: `report`, `advise`."""
    about, run = _OF_A_RUN[command]
    if _HELP_FLAGS & set(rest):
        print(f"Usage: slime {command} RUN (a name below runs/, or a folder): {about}")
        return 0
    if len(rest) != 1:
        return _refuse(f"{command} takes one RUN, found {len(rest)}: slime {command} RUN")
    try:
        run_dir = _run_dir(rest[0])
    except ValueError as error:
        return _refuse(f"{command} {rest[0]}: {error}")
    try:
        _say(run(run_dir))
    except (FileNotFoundError, ValueError) as error:
        return _refuse(f"{command} {run_dir}: {error}")
    return 0


def _run_dir(name: str) -> Path:
    """A run's folder. ValueError: there is no such run; see `expand`."""
    given = Path(expand(name))
    run_dir = given if given.is_dir() else Path("runs") / name
    if not run_dir.is_dir():
        runs = sorted(path.name for path in Path("runs").glob("*") if path.is_dir())
        raise ValueError(f"no such run; {'runs: ' + ', '.join(runs) if runs else 'runs/ has none'}")
    return run_dir


def _export(rest: list[str]) -> int:
    if _HELP_FLAGS & set(rest):
        print(EXPORT_HELP)
        return 0
    try:
        names, options = _take_options(rest, {"--step": "N", "--out": "DIR"})
        if len(names) != 1:
            raise ValueError(f"takes one RUN, found {len(names)}: slime export RUN [--step N] --out DIR")
        run_dir = _run_dir(names[0])
        step = options.get("--step")
        if step is not None and not step.isdigit():
            raise ValueError(f"--step {step}: must be a number of steps")
        if "--out" not in options:
            raise ValueError("where to? --out DIR names the folder to write")

        from slime.checkpoint import export

        _say(str(export(run_dir, None if step is None else int(step), Path(expand(options["--out"])))))
    except (ValueError, OSError) as error:
        return _refuse(f"export {' '.join(rest)}: {error}")
    return 0


def _report(run_dir: Path) -> str:
    from slime.report import write_report

    return str(write_report(run_dir))


def _advise(run_dir: Path) -> str:
    from slime.advise import advise
    from slime.observe.tracking import read_metrics
    from slime.report import read_config

    config = read_config(run_dir)
    if not config:
        raise ValueError("it has no config.yaml, which says what its baseline is: give the folder of a run")
    return "\n".join(advise(read_metrics(run_dir), config).lines())


_OF_A_RUN = {
    "report": ("makes its report.html again", _report),
    "advise": ("says whether to switch between critic and group baseline, with the figures behind it", _advise),
}


def _refuse(message: str) -> int:
    print(f"slime: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _take_recipes(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Splits `--recipes DIR` off. ValueError: see `_take_options` and `expand`."""
    overrides, options = _take_options(arguments, {"--recipes": "DIR"})
    return overrides, Path(expand(options["--recipes"])) if options else None


def _take_options(arguments: list[str], known: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Splits `--option VALUE` (or `--option=VALUE`) off the other arguments; `known`: what to call each VALUE.

    ValueError: an unknown option, or its value is missing.
    """
    others: list[str] = []
    found: dict[str, str] = {}
    pending = iter(arguments)
    for argument in pending:
        option, equals, value = argument.partition("=")
        if option in known:
            value = value if equals else next(pending, "")
            if not value or value.startswith("--"):
                folder = "a folder" if known[option] == "DIR" else "a number"
                raise ValueError(f"{option} needs {folder}: {option} {known[option]}")
            found[option] = value
        elif argument.startswith("-"):
            options = ", ".join(f"{name} {what}" for name, what in known.items())
            raise ValueError(f"unknown option {argument!r}; options: {options}, --help")
        else:
            others.append(argument)
    return others, found


def _train_help(command: str, folders: list[Path]) -> str:
    from slime.schema import Config

    lines = [TRAIN_HELP.format(command=command)]
    for group in catalogue.GROUPS:
        known = catalogue.names(folders, group)
        width = max(map(len, known), default=0) + 2
        lines += ["", f"{group}=NAME"]
        for name in known:
            path = catalogue.find(folders, group, name)
            lines.append(f"  {name:<{width}}{catalogue.describe(path) if path else ''}".rstrip())
    lines += ["", "Keys (slime config recipe=NAME shows each with its value)"]
    default = Config()
    for field in fields(Config):
        value = getattr(default, field.name)
        if is_dataclass(value):
            lines.append(f"  {field.name + '.*':<14}{(type(value).__doc__ or '').splitlines()[0]}".rstrip())
        elif field.name != "recipe":
            lines.append(f"  {field.name:<14}{_as_text(value)}")
    return "\n".join(lines)


def _show(loaded: Loaded, against: list[str]) -> None:
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")
    shown = [
        f"{text:<{_COMMENT_COLUMN}}  {dim}# {origin}{plain}" if origin else text
        for text, origin in _lines(loaded.config, loaded.origins)
    ]
    shown += ["", "this machine can not run it:" if against else "this machine can run it"]
    _say("\n".join([*shown, *(f"  {reason}" for reason in against)]))


def _say(text: str) -> None:
    """Prints for a reader, `head` for example, that may have seen enough before the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # leave nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _lines(node: Any, origins: dict[str, str], prefix: str = "", indent: str = "") -> list[tuple[str, str]]:
    """(text, origin) of each line; a section's own line has no origin, a derived property is no key to set."""
    lines: list[tuple[str, str]] = []
    items = node.items() if isinstance(node, dict) else ((f.name, getattr(node, f.name)) for f in fields(node))
    for name, value in items:
        key = f"{prefix}{name}"
        if is_dataclass(value) or (isinstance(value, dict) and value):
            lines.append((f"{indent}{name}:", ""))
            lines += _lines(value, origins, f"{key}.", indent + "  ")
        else:
            lines.append((f"{indent}{name}: {_as_text(value)}", origins.get(key, "default")))
    for name, attribute in vars(type(node)).items():
        if isinstance(attribute, property):
            lines.append((f"{indent}({name}: {_as_text(getattr(node, name))})", "derived"))
    return lines


def _as_text(value: Any) -> str:
    """A value as YAML and the command line write it."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "''" if value == "" else str(value)


if __name__ == "__main__":
    sys.exit(main())
