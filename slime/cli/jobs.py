"""Commands about a run that may be a scheduler's job: `slime status`, `slime logs`, `slime cancel`."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from slime.cli.common import JOB_FOLDER, RUNS, Refused, run_folder, run_names, say
from slime.cli.runs import Run

FOLLOW_S = 1.0  # between two looks at a log that is followed


def status(run: Run = None) -> int:
    """Show where runs stand, and their jobs.

    RUN: a name below runs/, or a folder; without one, all below runs/.
    """
    folders = [_of("status", name) for name in run] if run else [RUNS / name for name in run_names()]
    if not folders:
        raise Refused("status: runs/ has none")
    for folder in folders:
        say("\n".join(_status(folder)))
    return 0


def logs(
    run: Run = None,
    node: Annotated[str | None, typer.Option("--node", metavar="NAME", help="Log of this node's Ray.")] = None,
    lines: Annotated[int, typer.Option("--lines", metavar="N", min=1, help="Lines from its end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on while the job writes, until Ctrl-C.")] = False,
) -> int:
    """Show what a run's job has written.

    RUN: a name below runs/, or a folder.
    """
    folder = _one("logs", run)
    from launch.slurm.client import known_job

    job_id = known_job(folder / JOB_FOLDER)
    if not job_id:
        raise Refused(f"logs {folder}: it was not submitted as a job; its own logs are in {folder / 'logs'}")
    path = folder / JOB_FOLDER / (f"node_{node}_{job_id}.log" if node else f"job_{job_id}.log")
    if not path.is_file():
        there = sorted(one.name for one in path.parent.glob(f"*_{job_id}.log"))
        raise Refused(f"logs {folder}: no {path.name}; {'there is ' + ', '.join(there) if there else 'the job waits'}")
    with path.open(errors="replace") as file:
        say("".join(deque(file, lines)).rstrip("\n"))
        while follow:
            if more := file.read():
                print(more, end="", flush=True)
            time.sleep(FOLLOW_S)
    return 0


def cancel(
    run: Run = None,
    now: Annotated[bool, typer.Option("--now", help="At once, without saving its state.")] = False,
) -> int:
    """End a run's job for good.

    It saves its state first; slime submit or slime train goes on with it. RUN: a name below runs/, or a folder.
    """
    folder = _one("cancel", run)
    from launch.slurm.client import SlurmError, known_job
    from launch.slurm.client import cancel as end

    job_folder = folder / JOB_FOLDER
    job_id = known_job(job_folder)
    if not job_id:
        raise Refused(f"cancel {folder}: it was not submitted as a job; end it by Ctrl-C where it runs")
    try:
        say(end(job_folder, job_id, now))
    except (SlurmError, OSError) as error:
        raise Refused(f"cancel {folder}: {error}") from error
    return 0


def _one(command: str, names: list[str] | None) -> Path:
    if len(names or []) != 1:
        raise Refused(f"{command} takes one RUN, found {len(names or [])}: slime {command} RUN")
    return _of(command, (names or [])[0])


def _of(command: str, name: str) -> Path:
    try:
        return run_folder(name)
    except ValueError as error:
        raise Refused(f"{command} {name}: {error}") from error


def _status(folder: Path) -> list[str]:
    from launch.lock import holder_of
    from launch.slurm.client import SlurmError, describe, known_job, state_of
    from slime import checkpoint
    from slime.observe.standing import State, read_status
    from slime.observe.tracking import read_metrics

    known = read_status(folder)
    state = known.get("state", "not started")
    holder = holder_of(folder)
    if state == State.running.value and holder is None:
        state = "killed, to be continued by the same command"
    shown = [f"{folder.name}: {state}"]
    if known:
        rows, saved = read_metrics(folder), checkpoint.steps(folder)
        shown.append(f"step {rows[-1]['step'] if rows else 0} of {known['steps']}")
        shown.append(f"checkpoint of step {saved[-1]}" if saved else "no checkpoint")
        shown.append(f"{known['reason']} ({known['time']})" if known["reason"] else f"since {known['time']}")
    shown += [f"held by {holder}"] if holder else []
    found = [", ".join(shown)]
    if job_id := known_job(folder / JOB_FOLDER):
        try:
            job = describe(job_id)
            told = [state_of(job), job["Reason"], f"starts {int(job['Restarts']) + 1}", job["NodeList"]] if job else []
            words = ", ".join(filter(None, told)) or "Slurm has forgotten it: it has ended"
            found.append(f"  job {job_id}: {words}")
        except SlurmError as error:
            found.append(f"  job {job_id}: {error}")
    return found
