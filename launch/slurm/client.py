"""Slurm's own programs, asked from a node of the cluster or a login node."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_S = 60.0
JOB_FILE = "job.json"
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


class SlurmError(RuntimeError):
    """Slurm has refused or not answered: one line with its own words."""


def call(*command: str) -> str:
    """Return what a program of Slurm's prints. SlurmError: it is not there, fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise SlurmError(f"{command[0]} is not on PATH: run this where Slurm's programs are, a login node") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} has not answered in {TIMEOUT_S:g} s: is slurmctld running?") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(command[:2])}: {said}")
    return done.stdout


def submit(script: Path) -> str:
    """Start a batch script as a job, once there is room, and return the job's number. SlurmError: see `call`."""
    return call("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def describe(job_id: str) -> Mapping[str, str]:
    """Return what Slurm knows of a job (JobState, Reason, Restarts, NodeList ...); {} for one that it has forgotten.

    SlurmError: see `call`.
    """
    try:
        return _pairs(call("scontrol", "show", "job", "--oneliner", job_id))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise


def state_of(job: Mapping[str, str]) -> str:
    """Return the state of a job that `describe` has returned; "" for one that Slurm has forgotten."""
    return job.get("JobState", "")


def lives(job: Mapping[str, str]) -> bool:
    """Return whether a job waits, runs or is about to wait or run again."""
    return bool(job) and state_of(job) not in ENDED


def addresses(nodes: Sequence[str]) -> dict[str, str]:
    """Return the address of every node, which is a number: nodes may not know each other's names.

    SlurmError: see `call`, or Slurm has only a name that this machine does not know.
    """
    found = {}
    for line in call("scontrol", "show", "node", "--oneliner", ",".join(nodes)).splitlines():
        pairs = _pairs(line)
        if "NodeName" in pairs:
            found[pairs["NodeName"]] = _number(pairs.get("NodeAddr", pairs["NodeName"]))
    if missing := [node for node in nodes if node not in found]:
        raise SlurmError(f"scontrol show node does not tell of {', '.join(missing)}")
    return found


def _number(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        pass
    try:
        return socket.gethostbyname(address)
    except OSError as error:
        raise SlurmError(f"{address}: no address is known for this node's NodeAddr ({error})") from error


def _pairs(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|\s)(\w[\w:/]*)=(\S*)", line))


def remember(folder: Path, job_id: str) -> None:
    """Note in the folder of a run's job which one it is. OSError: the folder can't be written to."""
    record = {"id": job_id, "submitted": time.strftime("%Y-%m-%d %H:%M:%S")}
    (folder / JOB_FILE).write_text(json.dumps(record) + "\n")


def known_job(folder: Path) -> str:
    """Return the number of the job that was submitted last, "" where there is none."""
    try:
        return str(json.loads((folder / JOB_FILE).read_text())["id"])
    except (OSError, ValueError, KeyError):
        return ""


def cancelled_file(folder: Path, job_id: str) -> Path:
    """Return the file whose presence tells a job that it is not to start again."""
    return folder / f"cancelled_{job_id}"


def cancel(folder: Path, job_id: str, now: bool) -> str:
    """End a job and return in words how: one that runs saves its state first, unless `now`. SlurmError: see `call`."""
    job = describe(job_id)
    if not lives(job):
        return f"job {job_id} has ended already"
    cancelled_file(folder, job_id).touch()
    if now or state_of(job) != "RUNNING":
        call("scancel", job_id)
        return f"job {job_id} is cancelled"
    call("scancel", "--batch", "--signal=USR1", job_id)
    return f"job {job_id} saves its state and ends"
