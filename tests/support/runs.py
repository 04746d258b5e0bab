"""Helpers for tests of whole runs: the real command in a separate process, observed through its files and output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from processes import every_process

START_S = 900.0  # generous: engines, workers and sandboxes start within a minute on two idle cores
GONE_S = 120.0
SLIME = str(Path(sys.executable).with_name("slime"))
MARK = "SLIME_TEST_MARK"


@dataclass
class Place:
    """A folder for runs, and one for temporary files with a path short enough for Ray's sockets."""

    folder: Path
    temporary: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp")))

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def command(self, *overrides: str) -> list[str]:
        places = [f"runs_dir={self.folder / 'runs'}", f"cache_dir={self.folder / 'cache'}"]
        return [SLIME, "train", *places, *overrides]


class Run:
    """One `slime train` process and everything that it starts."""

    def __init__(self, place: Place, *overrides: str, environment: Mapping[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.log = place.folder / f"{self.mark}.log"
        self._known: set[psutil.Process] = set()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {MARK: self.mark, "TMPDIR": str(place.temporary), "WANDB_MODE": "offline"}
        self.process = subprocess.Popen(
            place.command(*overrides),
            cwd=Path(__file__).parent,  # contains the task's module
            env={**inherited, **own, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill every process of the run, so that none outlives the test."""
        for process in self.processes():
            process.kill()
        self.process.kill()
        self.process.wait(timeout=GONE_S)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Live processes that inherited this run's mark, and all that were their children at an earlier call.

        Sandboxes have a clean environment: they are found as children, while their parents live.
        """
        for process in every_process():
            try:
                if process.environ().get(MARK) == self.mark:
                    self._known |= {process, *process.children(recursive=True)}
            except psutil.Error:
                continue
        return [process for process in self._known if alive(process)]

    def one(self, name: str, of: int = 1) -> psutil.Process:
        """Return a process of the run whose command line contains the name. AssertionError: there are not `of` such."""
        found = [process for process in self.processes() if name in " ".join(process.cmdline())]
        assert len(found) == of, f"{len(found)} processes are called {name}: {self.tail()}"
        return found[0]

    def wait_until(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        """Wait until the condition holds.

        AssertionError with the end of the output: the run has ended before, or the time limit is over.
        """
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}: {self.tail()}"
            assert time.monotonic() < deadline, f"no {what} after {limit_s} s: {self.tail()}"
            time.sleep(0.2)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Suspend the run's own process within the block, so that its engines can be inspected."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def finish(self, limit_s: float = START_S) -> Run:
        """Wait for the end of the run. AssertionError: it failed."""
        try:
            code = self.process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished after {limit_s} s: {self.tail()}") from None
        assert code == 0, f"exit code {code}: {self.tail()}"
        return self

    def left_over(self, but: Sequence[str] = ()) -> list[str]:
        """Return the processes, except those with the given names, that still run `GONE_S` after the run has ended."""
        deadline = time.monotonic() + GONE_S
        while (found := [p for p in self.processes() if name_of(p) not in but]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [str(process) for process in found]

    def tail(self) -> str:
        return "\n".join(self.output.splitlines()[-40:])


def name_of(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return "gone"


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSONL file; [] if it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
