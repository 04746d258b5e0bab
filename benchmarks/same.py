"""Comparison of training in two checkouts: a short demo with a fixed seed in each, metric by metric.

    .venv/bin/python benchmarks/same.py OTHER_CHECKOUT [--steps 5] [-- key=value ...]

It runs `slime train recipe=ppo_coding` in both with this interpreter and one episode at a time, evaluation episodes
first, so that the order in which the engine samples does not depend on a clock; `model.path=FOLDER` starts both from
the same model. It prints every metric that differs, and exits with 1 if there is one. Times, memory and rates are not
compared. A refactoring must leave all other metrics unchanged, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("time", "_gb", "seconds", "per_s", "straggler", "recovery")  # substrings of names: measured or counted
SMALL = (
    *("recipe=ppo_coding", "run=same", "model.start=", "tracking.wandb=false", "checkpoint.every=0", "eval.every=0"),
    *("buffer.episodes_per_step=16", "critic.warmup_episodes=0", "eval.num_tasks=1"),
    *("rollout.num_workers=1", "rollout.episodes_in_flight=1", "task.target=one_at_a_time:OneAtATime"),
)
TASK = """
import asyncio

from recipes.coding import CodingTask

LOCK, EVALUATED = asyncio.Lock(), asyncio.Event()


class OneAtATime(CodingTask):
    def environment(self, row, sandbox):
        environment = super().environment(row, sandbox)
        start, reward, evaluating = environment.start, environment.reward, row.id.startswith("eval")

        async def start_alone():
            if not evaluating:
                await EVALUATED.wait()
            await LOCK.acquire()
            return await start()

        async def reward_and_leave():
            try:
                return await reward()
            finally:
                LOCK.release()
                if evaluating:
                    EVALUATED.set()

        environment.start, environment.reward = start_alone, reward_and_leave
        return environment
"""

Rows = Sequence[Mapping[str, float]]


def train(checkout: Path, folder: Path, overrides: Sequence[str]) -> Rows:
    """Train in a checkout and return the rows of its metrics. CalledProcessError: the run failed."""
    folder.mkdir()
    (folder / "one_at_a_time.py").write_text(TASK)
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{folder}"}
    folders = [f"runs_dir={folder}", f"cache_dir={folder / 'cache'}"]
    command = [sys.executable, "-m", "slime.cli", "train", *SMALL, *folders, *overrides]
    subprocess.run(command, cwd=checkout, env=environment, check=True)
    return [json.loads(line) for line in (folder / "same" / "metrics.jsonl").read_text().splitlines()]


def differences(ours: Rows, theirs: Rows) -> Iterator[str]:
    """Yield a line for each metric that is not the same number in both runs."""
    if len(ours) != len(theirs):
        yield f"{len(ours)} rows here, {len(theirs)} there"
    for own, other in zip(ours, theirs, strict=False):
        for name in sorted(own.keys() | other.keys()):
            if any(word in name for word in MEASURED):
                continue
            if own.get(name) != other.get(name):
                yield f"step {own['step']:.0f}: {name} is {own.get(name)} here, {other.get(name)} there"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of another revision, for example of `git worktree add`")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of both runs, after --")
    options = parser.parse_intermixed_args(arguments)
    overrides = [f"steps={options.steps}", *options.overrides]
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (
            train(checkout.resolve(), Path(folder) / name, overrides)
            for checkout, name in ((ROOT, "ours"), (options.other, "theirs"))
        )
    found = list(differences(ours, theirs))
    names = {name for row in ours for name in row if not any(word in name for word in MEASURED)}
    print("\n".join(found) or f"{len(names)} metrics of {len(ours)} rows are the same")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
