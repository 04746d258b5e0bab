"""Rollout workers as their caller sees them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from rollout.worker import Played

POLL_S = 1.0


class RolloutGroup:
    """All rollout workers."""

    def __init__(self, workers: Sequence[Any], quiet_s: float) -> None:
        """`quiet_s`: episodes may take as long as they do, unless nothing happens in any of them for so long."""
        self.workers = list(workers)
        self.quiet_s = quiet_s
        self._running: list[Any] = []

    def run(self, buffer: Any) -> None:
        """Let every worker play the buffer's tickets from now on."""
        self._running = [worker.run.remote(buffer) for worker in self.workers]

    def check(self) -> None:
        """Raise what a worker's loop raised; it should only end when stopped."""
        ended, _ = ray.wait(self._running, num_returns=len(self._running), timeout=0)
        ray.get(ended)

    def _share(self, indices: Sequence[int]) -> list[list[int]]:
        return [list(indices[k :: len(self.workers)]) for k in range(len(self.workers))]

    def evaluate(self, indices: Sequence[int], keep: int) -> list[Played]:
        """Return held-out episodes at training's settings; sub-traces come with about `keep` of them."""
        each = -(-keep // len(self.workers))
        shares = zip(self.workers, self._share(indices), strict=True)
        refs = [worker.evaluate.remote(share, each) for worker, share in shares]
        return self.played(refs, "evaluation")

    def played(self, refs: Sequence[Any], what: str) -> list[Played]:
        """Return episodes that were asked for, one reference a worker. A worker's error or death is raised at once.

        TimeoutError: no worker got an answer of an engine, or ended an episode, for `quiet_s`.
        """
        late, before = list(refs), -1
        asked: list[Any] = []
        deadline = time.monotonic() + self.quiet_s
        while late:
            done, late = ray.wait(late, num_returns=len(late), timeout=POLL_S)
            ray.get(done, timeout=60)  # raises what went wrong
            asked = asked or [worker.progress.remote() for worker in self.workers]
            if len(ray.wait(asked, num_returns=len(asked), timeout=0)[0]) == len(asked):
                now, asked = sum(ray.get(asked, timeout=60)), []
                if now != before:
                    before, deadline = now, time.monotonic() + self.quiet_s
            if late and time.monotonic() > deadline:
                workers = sorted(refs.index(ref) for ref in late)
                raise TimeoutError(
                    f"{what}: nothing happened in the episodes of rollout workers {workers} for {self.quiet_s:g} s"
                )
        return [played for part in ray.get(list(refs), timeout=60) for played in part]

    def demonstrate(self, indices: Sequence[int], progress: float) -> list[Any]:
        """Return references for `played`, one a worker."""
        shares = zip(self.workers, self._share(indices), strict=True)
        return [worker.demonstrate.remote(share, progress) for worker, share in shares]

    def stop(self, timeout_s: float = 60.0) -> None:
        """End episodes, sandboxes and clients."""
        ray.get([worker.stop.remote() for worker in self.workers], timeout=timeout_s)
