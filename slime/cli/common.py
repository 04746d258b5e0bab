"""Helpers of the commands: errors in the user's input, output for readers that stop early, the folder of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch.environment import expand

RUNS = Path("runs")
JOB_FOLDER = "slurm"  # in the folder of a run: the script and the logs of its job


class Refused(ValueError):
    """An error in the user's input: one line, exit code 2."""


def say(text: str) -> None:
    """Print for a reader that may stop before the end, for example `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # leave nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_names(runs: Path = RUNS) -> list[str]:
    """Return the names of the runs below a folder, sorted."""
    return sorted(path.name for path in runs.glob("*") if path.is_dir())


def run_folder(name: str) -> Path:
    """Return a run's folder. ValueError: there is no such run; see `expand`."""
    given = Path(expand(name))
    folder = given if given.is_dir() else RUNS / name
    if not folder.is_dir():
        raise ValueError(f"no such run; {'runs: ' + ', '.join(run_names()) if run_names() else 'runs/ has none'}")
    return folder
