"""Commands about a run that exists: `slime report`, `slime advise`, `slime export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from launch.environment import expand
from slime.cli.common import Refused, run_folder, run_names, say


def _complete(incomplete: str) -> list[str]:
    return [name for name in run_names() if name.startswith(incomplete)]


Run = Annotated[
    list[str] | None,  # one; more are counted in the refusal
    typer.Argument(metavar="RUN", hidden=True, autocompletion=_complete),
]


def report(run: Run = None) -> int:
    """Write the report of a run again.

    RUN: a name below runs/, or a folder.
    """

    def write(folder: Path) -> str:
        from slime.report import write_report

        return str(write_report(folder))

    return _of_one("report", run, write)


def advise(run: Run = None) -> int:
    """Advise on critic or group baseline.

    Says whether to switch between them, with the figures of the run behind it. RUN: a name below runs/, or a folder.
    """

    def judge(folder: Path) -> str:
        from slime.advise import advise
        from slime.observe.tracking import read_metrics
        from slime.report import read_config

        config = read_config(folder)
        if not config:
            raise ValueError("it has no config.yaml, which says what its baseline is: give the folder of a run")
        return "\n".join(advise(read_metrics(folder), config).lines())

    return _of_one("advise", run, judge)


def export(
    run: Run = None,
    step: Annotated[
        str | None, typer.Option("--step", metavar="N", help="Checkpoint to export; without it, the newest.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="New folder to write.")] = None,
) -> int:
    """Write a policy as a Hugging Face folder.

    Writes weights, config and tokenizer of a checkpoint's policy; needs no GPU. RUN: a name below runs/, or a folder.
    """
    names = run or []
    given = " ".join(["export", *names, *(["--step", step] if step else []), *(["--out", out] if out else [])])
    try:
        if len(names) != 1:
            raise ValueError(f"takes one RUN, found {len(names)}: slime export RUN [--step N] --out DIR")
        folder = run_folder(names[0])
        if step is not None and not step.isdigit():
            raise ValueError(f"--step {step}: must be a number of steps")
        if out is None:
            raise ValueError("where to? --out DIR names the folder to write")

        from slime.checkpoint import export

        say(str(export(folder, None if step is None else int(step), Path(expand(out)))))
    except (ValueError, OSError) as error:
        raise Refused(f"{given}: {error}") from error
    return 0


def _of_one(command: str, names: list[str] | None, work: Callable[[Path], str]) -> int:
    """Call `work` with the run's folder. Refused: not one run, no such run, or an error of `work`."""
    if len(names or []) != 1:
        raise Refused(f"{command} takes one RUN, found {len(names or [])}: slime {command} RUN")
    (name,) = names or []
    try:
        folder = run_folder(name)
    except ValueError as error:
        raise Refused(f"{command} {name}: {error}") from error
    try:
        say(work(folder))
    except (FileNotFoundError, ValueError) as error:
        raise Refused(f"{command} {folder}: {error}") from error
    return 0
