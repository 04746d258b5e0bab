"""The process of a batch job, as its script starts it: `python -m slime.cli.job OPTIONS -- recipe=NAME ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.job import run_job
from slime import checkpoint

TRAIN = (sys.executable, "-m", "slime.cli", "train")


def main(arguments: Sequence[str]) -> int:
    """Run a run in its job and return the job's exit code."""
    parser = argparse.ArgumentParser(prog="slime.cli.job")
    parser.add_argument("--folder", type=Path, required=True, help="Folder of the job's logs, in the run's folder.")
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--max-starts", type=int, required=True)
    parser.add_argument("train", nargs="+", help="Arguments of slime train.")
    given = parser.parse_args(arguments)
    newest = (checkpoint.steps(given.folder.parent) or [0])[-1]
    return run_job(given.folder, given.gpus_per_node, newest, given.max_starts, [*TRAIN, *given.train])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
