"""Runs whose processes are killed at random moments, compared with one that nobody disturbs.

    .venv/bin/python -m benchmarks.chaos run --kills 100 [--seed 0] [-- key=value ...]
    .venv/bin/python -m benchmarks.chaos table

`run` first trains without a disturbance. Then it starts the same small synchronous run again and again until it has
sent that many SIGKILLs, to a random process of a random kind after a random time. A dead driver is started again by the
same command. Each run must end well, and all metrics of all its steps must have the same bits as in the first run, but
for times, memory and counts of recoveries: then no episode was lost or trained twice. Results are in runs/chaos/, one
line per kill in kills.jsonl. Exit code 1: a run failed or differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.same import differences
from slime.observe.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    *("recipe=ppo_coding", "steps=12", "checkpoint.every=1", "eval.every=3", "eval.num_tasks=16"),
    *("buffer.episodes_per_step=32", "policy.num_minibatches=2", "critic.num_minibatches=2"),
    *("critic.warmup_episodes=64", "rollout.num_workers=2", "tracking.wandb=false"),
)
# Kind of process -> what its command line contains, and what the output says when it is back.
KINDS = {
    "engine": ("sglang::scheduler", "serves again after"),
    "rollout worker": ("ray::RolloutWorker", "plays again after"),
    "policy rank": ("ray::PolicyWorker", "all training processes started again"),
    "critic rank": ("ray::CriticWorker", "all training processes started again"),
    "data buffer": ("ray::BufferActor", "all training processes started again"),
    "driver": ("", "resumed at step"),
}
LIMIT_S = 900.0  # for a process to come back
LONGEST_PAUSE_S = 10.0
POLL_S = 0.1


@dataclass
class Driver:
    """The command of one run, started again when it is killed."""

    folder: Path
    name: str
    overrides: Sequence[str]
    starts: int = 0

    def __post_init__(self) -> None:
        self.log = self.folder / f"{self.name}.log"
        self.begin()

    @property
    def recovers(self) -> bool:
        """Return whether the run has begun to train: a death while it starts ends it."""
        return self.output.count("value pre-training: episodes") + self.output.count("resumed at step") >= self.starts

    def begin(self) -> None:
        """Start the command, or start it again."""
        self.starts += 1
        own = [f"run={self.name}", f"runs_dir={self.folder}", f"cache_dir={self.folder / 'cache'}"]
        command = [sys.executable, "-m", "slime.cli", "train", *SMALL, *own, *self.overrides]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        """Return what the run has printed."""
        return self.log.read_text(errors="replace")

    @property
    def rows(self) -> Sequence[Mapping[str, float]]:
        """Return the metrics of the steps that are done."""
        return read_metrics(self.folder / self.name)

    def find(self, kind: str, rng: random.Random) -> psutil.Process | None:
        """Return a process of a kind, or None while there is none."""
        if kind == "driver":
            return psutil.Process(self.process.pid)
        found = [one for one in self._descendants() if KINDS[kind][0] in " ".join(one.cmdline())]
        return rng.choice(found) if found else None

    def _descendants(self) -> Iterator[psutil.Process]:
        for one in psutil.Process(self.process.pid).children(recursive=True):
            try:
                one.cmdline()
            except psutil.Error:
                continue
            yield one


def kill_one(driver: Driver, rng: random.Random) -> dict[str, object] | None:
    """Kill a process and wait until it is back. Return the kill's record, or None if the run ended before."""
    if not _wait(driver, lambda: driver.recovers, time.monotonic() + LIMIT_S):
        return None
    kind, until = rng.choice(list(KINDS)), time.monotonic() + rng.uniform(0, LONGEST_PAUSE_S)
    if not _wait(driver, lambda: time.monotonic() > until, until + LIMIT_S):
        return None
    try:
        victim = driver.find(kind, rng)
        if victim is None:
            return {}
        step, seen, began = len(driver.rows), driver.output.count(KINDS[kind][1]), time.monotonic()
        victim.kill()
    except psutil.NoSuchProcess:
        return {}
    if kind == "driver":
        driver.process.wait()
        driver.begin()
    # A run without a checkpoint begins anew, and a run in its last step may end before the process is back.
    back = KINDS[kind][1]
    done = _wait(driver, lambda: driver.output.count(back) > seen or len(driver.rows) > step, began + LIMIT_S)
    return {"kind": kind, "step": step, "seconds": time.monotonic() - began, "ended": not done}


def _wait(driver: Driver, condition: Callable[[], bool], deadline: float) -> bool:
    """Wait for a condition; False: the run has ended before. TimeoutError."""
    while not condition():
        if driver.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"{driver.name}: nothing happened, see {driver.log}")
        time.sleep(POLL_S)
    return True


def disturbed(driver: Driver, rng: random.Random, kills: int, record: Path) -> int:
    """Disturb a run until it ends or has had its kills; return their number. RuntimeError: the run failed."""
    done = 0
    while done < kills and (found := kill_one(driver, rng)) is not None:
        if found:
            done += 1
            with record.open("a") as lines:
                lines.write(json.dumps({"run": driver.name, **found}) + "\n")
    if code := driver.process.wait():
        raise RuntimeError(f"{driver.name} ended with exit code {code}: {driver.output.splitlines()[-1]}")
    return done


def run(folder: Path, kills: int, seed: int, overrides: Sequence[str]) -> int:
    """Train undisturbed, then disturbed, and return the number of runs that differ or failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    quiet = Driver(folder, "quiet", overrides)
    if quiet.process.wait():
        raise RuntimeError(f"the undisturbed run failed: {quiet.output.splitlines()[-1]}")
    rng, failed, number = random.Random(seed), 0, 0
    while kills > 0:
        driver = Driver(folder, f"disturbed_{number}", overrides)
        kills -= disturbed(driver, rng, kills, folder / "kills.jsonl")
        found = list(differences(driver.rows, quiet.rows))
        print("\n".join([f"{driver.name}: {'differs' if found else 'the same'}, {kills} kills left", *found[:5]]))
        failed += bool(found)
        number += 1
    return failed


def table(kills: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yield the lines of the table of kills, by kind of process."""
    yield "| process | kills | back again | seconds until then, median | longest |"
    yield "|---|---|---|---|---|"
    for kind in KINDS:
        mine = [kill for kill in kills if kill["kind"] == kind]
        if mine:
            seconds = sorted(float(str(kill["seconds"])) for kill in mine if not kill["ended"])
            told = (f"{seconds[len(seconds) // 2]:.0f}", f"{seconds[-1]:.0f}") if seconds else ("-", "-")
            yield f"| {kind} | {len(mine)} | {len(seconds)} | {told[0]} | {told[1]} |"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "chaos")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, after --")
    options = parser.parse_intermixed_args(arguments)
    if options.action == "run":
        return 1 if run(options.folder, options.kills, options.seed, options.overrides) else 0
    lines = (options.folder / "kills.jsonl").read_text().splitlines()
    print("\n".join(table([json.loads(line) for line in lines])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
