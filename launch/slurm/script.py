"""The batch script of a job, as text. Slurm reads its `#SBATCH` lines, a node's shell all others."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What the script says itself: another value would break the way in which a job ends and starts again.
OWN_OPTIONS = {
    *("array", "chdir", "error", "gpus-per-node", "gres", "job-name", "no-requeue", "nodes", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "requeue", "signal", "time", "wrap"),
}
# Options by which a job asks for some of a node; without them it has its nodes alone.
SHARES = {"cpus-per-task", "cpus-per-gpu", "exclusive", "oversubscribe", "mincpus"}
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
CLEANUP_S = 120.0  # a run's, after it has saved its state: engines, sandboxes, Ray


@dataclass(frozen=True)
class BatchJob:
    """What Slurm is asked for, and what is run there."""

    name: str
    folder: Path  # of its logs, absolute
    work_dir: Path  # current folder of the run, absolute
    command: Sequence[str]  # of the job's process
    num_nodes: int
    gpus_per_node: int
    grace_s: float  # for a run to save its state
    time_limit: str = ""  # as sbatch takes it; "": that of the partition
    options: Mapping[str, str] = field(default_factory=dict)  # further options of sbatch, without dashes
    setup: Sequence[str] = ()  # shell lines before the command

    @property
    def notice_s(self) -> int:
        """Return how long before its time limit the job is told to end, seconds."""
        return round(self.grace_s + CLEANUP_S)


def seconds(time_limit: str) -> int:
    """Return a time limit of sbatch's in seconds. ValueError: it is none."""
    found = _TIME.fullmatch(time_limit)
    if found is None:
        raise ValueError(f"--time {time_limit}: must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    numbers = [int(number) for number in found["rest"].split(":")]
    if found["days"] is not None:  # D-H, D-H:M, D-H:M:S
        hours, minutes, rest = (*numbers, 0, 0)[:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + rest
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)  # M, M:S


def problems(job: BatchJob) -> list[str]:
    """Return what is wrong with a job, one line each with number and cure."""
    found = []
    for name, value in job.options.items():
        if not _OPTION.fullmatch(name) or "\n" in value:
            found.append(
                f"--sbatch {name}={value}: must be NAME=VALUE, NAME a long option of sbatch without its dashes"
            )
        elif name in OWN_OPTIONS:
            found.append(f"--sbatch {name}: slime sets this option itself; leave it out")
    if job.time_limit:
        try:
            limit_s = seconds(job.time_limit)
        except ValueError as error:
            return [*found, str(error)]
        if limit_s <= job.notice_s:
            found.append(
                f"--time {job.time_limit} is {limit_s} s, and the run is told to end {job.notice_s} s before it "
                "(checkpoint.grace_s + 120 for its end): ask for more time or use a smaller checkpoint.grace_s"
            )
    return found


def render(job: BatchJob) -> str:
    """Return the text of the batch script."""
    options = {
        "job-name": job.name,
        "nodes": str(job.num_nodes),
        "ntasks-per-node": "1",
        **({"gres": f"gpu:{job.gpus_per_node}"} if job.gpus_per_node else {}),
        **({"time": job.time_limit} if job.time_limit else {}),
        **({} if SHARES & job.options.keys() else {"exclusive": "", "mem": "0"}),
        **job.options,
        "signal": f"B:USR1@{job.notice_s}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{str(job.folder).replace('%', '%%')}/job_%j.log",
    }
    lines = [f"#SBATCH --{name}{'=' + shlex.quote(value) if value else ''}" for name, value in options.items()]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# Made by `slime submit slurm`. The job starts again, from its newest checkpoint, until the run is done.",
            *lines,
            "set -euo pipefail",
            "trap '' USR1 TERM # until the job's process handles them",
            f"cd {shlex.quote(str(job.work_dir))}",
            *job.setup,
            f"exec {shlex.join(job.command)}",
            "",
        ]
    )
