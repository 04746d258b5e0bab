"""The vocabulary of the checks: what a run would use, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from launch.config import ClusterConfig

MAX_NAMED = 3  # nodes in a finding


class Level(str, Enum):
    """How much a finding matters: a run is refused for a problem alone."""

    ok = "ok"
    warning = "warning"
    problem = "problem"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one machine, or on several that all have the same."""

    check: str
    level: Level
    text: str  # one line; with the cure unless all is well
    node: str = ""  # address, or several with commas; "" for this machine


@dataclass(frozen=True)
class Needs:
    """What a run would use of the machines."""

    cluster: ClusterConfig
    runs_dir: Path
    sandbox: bool = True  # False: tools may run without one
    checkpoint_bytes: int = 0  # of one checkpoint of all roles; 0: not known
    kept: int = 0  # checkpoints that stay on disk
    num_rollout_workers: int = 0  # distributed round-robin over the nodes
    cache_dir: Path | None = None
    model_folder: Path | None = None  # None: the task makes its own model in cache_dir


def ok(check: str, text: str) -> list[Finding]:
    """Return the finding of a check that found no problem."""
    return [Finding(check, Level.ok, text)]


def warning(check: str, text: str) -> list[Finding]:
    """Return one warning."""
    return [Finding(check, Level.warning, text)]


def problem(check: str, text: str) -> list[Finding]:
    """Return one problem."""
    return [Finding(check, Level.problem, text)]


def named(addresses: Sequence[str]) -> str:
    """Return the addresses, at most MAX_NAMED of them in full."""
    more = len(addresses) - MAX_NAMED
    return ", ".join(addresses[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
