"""The command line: `slime COMMAND`. A command is a function that is named in COMMANDS, or in TARGETS for
`slime submit TARGET`, and nowhere else.

Its docstring is its help; it returns an exit code and raises `Refused` for a mistake of the user's, which becomes one
line on stderr. Nothing heavy is imported before a command runs, so that help and completion answer at once.

    def plan(run: Annotated[str, typer.Argument(metavar="RUN")]) -> int:
        '''Show where every process would be placed.'''
        from slime.plan import plan  # takes seconds to import
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from functools import wraps
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from slime.cli.common import Refused
from slime.cli.doctor import doctor
from slime.cli.jobs import cancel, logs, status
from slime.cli.kubernetes import k8s
from slime.cli.runs import advise, export, report
from slime.cli.slurm import slurm
from slime.cli.training import config, train

COMMANDS = (train, config, doctor, report, advise, export, status, logs, cancel)
TARGETS = (slurm, k8s)  # of `slime submit`
EPILOG = """\
'slime train --help' lists recipes, models, clusters and keys. Example: slime train recipe=ppo_coding steps=20"""
_ASKS_HELP = {"-h", "--help", "help"}
_NEEDS = {"DIR": "a folder", "N": "a number"}  # what a value is, by its name in help


class _Interrupted(Exception):
    """SIGINT arrived during a command. The library would end without a message."""


class _Command(TyperCommand):
    """A command whose usage line shows its arguments in the form in which they are typed."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [one.metavar or "" for one in self.params if one.param_type_name == "argument"]
        return [*arguments, *(f"[{one.opts[0]} {one.metavar}]" for one in _options(self) if one.metavar)]


def _options(command: Any) -> list[Any]:
    return [one for one in command.params if one.param_type_name == "option"]


def _app() -> TyperGroup:
    app = typer.Typer(
        help="Train language-model agents with reinforcement learning.",
        epilog=EPILOG,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(lambda: None)  # without options of its own
    for command in COMMANDS:
        own_help = command in (train, config)  # which explains keys, too
        app.command(cls=_Command, add_help_option=not own_help)(_guarded(command))
    submit = typer.Typer(help="Hand a run to a cluster's scheduler.", rich_markup_mode=None)
    submit.callback()(lambda: None)
    for target in TARGETS:
        submit.command(cls=_Command)(_guarded(target))
    app.add_typer(submit, name="submit")
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def _guarded(command: Any) -> Any:
    @wraps(command)
    def guarded(*args: Any, **options: Any) -> int:
        try:
            code: int = command(*args, **options)
        except KeyboardInterrupt as error:
            raise _Interrupted from error
        return code

    return guarded


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code, with one line on stderr for all but 0.

    0 done, 2 refused, 1 failed, 75 told to end by a launcher's signal and to be started again, 128 + N stopped by
    another signal N.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(given)
    except (Refused, TyperException) as error:
        print(f"slime: error: {' '.join(_worded(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _Interrupted):
        print("slime: stopped by SIGINT", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    group = _app()
    code = group.main(_checked(group, arguments), prog_name="slime", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _checked(group: TyperGroup, arguments: list[str]) -> list[str]:
    """Return the arguments in the library's form. Refused: an unknown command, or see `_refuse_options`."""
    command, *rest = arguments or ["--help"]
    if command in _ASKS_HELP:
        return ["--help"]
    if command in group.commands:
        found = group.commands[command]
        if isinstance(found, TyperGroup):
            return [command, *_checked(found, rest)]
        _refuse_options(found, rest)
    elif command.startswith("-"):
        _refuse_options(group, [command])
    else:
        near = get_close_matches(command, group.commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(group.commands)}"
        raise Refused(f"unknown command {command!r}; {hint}")
    return arguments


def _refuse_options(command: Any, arguments: list[str]) -> None:
    """Refuse an unknown option, named as it was typed, or an option without its value."""
    known = {name: one.metavar for one in _options(command) for name in one.opts} | {"--help": None, "-h": None}
    pending = iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if what := known.get(name):
            value = value if equals else next(pending, "")
            if not value or value.startswith("--"):
                raise Refused(f"{name} needs {_NEEDS.get(what, 'a value')}: {name} {what}")
        elif argument.startswith("-") and argument not in known:
            shown = ", ".join(f"{one} {named}" if named else one for one, named in known.items() if one != "-h")
            raise Refused(f"unknown option {argument!r}; options: {shown}")


def _worded(error: Exception) -> str:
    return error.format_message() if isinstance(error, TyperException) else str(error)
