"""A typed handle to all rollout workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayActorError

from machine.actors import call
from rollout.worker import Played, RolloutWorker, Tickets

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

POLL_S = 1.0
TOLD_TIMEOUT_S = 60.0  # for a call that waits for nothing


class RolloutGroup:
    """All rollout workers of a run."""

    def __init__(self, workers: Sequence[ActorHandle[RolloutWorker]], quiet_s: float) -> None:
        """`quiet_s`: a wait fails when no episode makes progress for this long. Single episodes have no time limit."""
        self.workers = list(workers)
        self.quiet_s = quiet_s
        self._running: list[ObjectRef[None]] = []

    def start(self) -> list[ObjectRef[None]]:
        """Start every worker; return references that are ready when the workers have loaded what they need."""
        return [call(worker, RolloutWorker.start) for worker in self.workers]

    def run(self, buffer: Tickets) -> None:
        """Start playing the buffer's tickets on every worker."""
        self._running = [call(worker, RolloutWorker.run, buffer) for worker in self.workers]

    def set_engines(self, urls: Sequence[str]) -> None:
        """Let every worker use exactly the engines at `urls` from now on. A worker that has died is left out."""
        for told in [call(worker, RolloutWorker.set_engines, urls) for worker in self.workers]:
            with contextlib.suppress(RayActorError):
                ray.get(told, timeout=TOLD_TIMEOUT_S)

    def check(self) -> None:
        """Raise the error of a worker whose loop has ended; a loop should end only when stopped."""
        ended, _ = ray.wait(self._running, num_returns=len(self._running), timeout=0)
        ray.get(ended)

    def _share(self, indices: Sequence[int]) -> list[list[int]]:
        return [list(indices[k :: len(self.workers)]) for k in range(len(self.workers))]

    def evaluate(self, indices: Sequence[int], keep: int, waiting: Callable[[], None] = lambda: None) -> list[Played]:
        """Return held-out episodes, played with training's settings; about `keep` of them include their sub-traces.

        Call `waiting` every `POLL_S` until they are played.
        """
        each = -(-keep // len(self.workers))
        shares = zip(self.workers, self._share(indices), strict=True)
        refs = [call(worker, RolloutWorker.evaluate, share, each) for worker, share in shares]
        return self.played(refs, "evaluation", waiting)

    def played(
        self, refs: Sequence[ObjectRef[list[Played]]], what: str, waiting: Callable[[], None] = lambda: None
    ) -> list[Played]:
        """Return the requested episodes; `refs` has one reference per worker. A worker's error is raised at once.

        TimeoutError: for `quiet_s`, no worker received an engine's answer or ended an episode.
        """
        late, before = list(refs), -1
        asked: list[ObjectRef[int]] = []
        deadline = time.monotonic() + self.quiet_s
        while late:
            done, late = ray.wait(late, num_returns=len(late), timeout=POLL_S)
            ray.get(done, timeout=60)  # raises a worker's error
            waiting()
            asked = asked or [call(worker, RolloutWorker.progress) for worker in self.workers]
            if len(ray.wait(asked, num_returns=len(asked), timeout=0)[0]) == len(asked):
                now, asked = sum(ray.get(asked, timeout=60)), []
                if now != before:
                    before, deadline = now, time.monotonic() + self.quiet_s
            if late and time.monotonic() > deadline:
                workers = sorted(refs.index(ref) for ref in late)
                raise TimeoutError(
                    f"{what}: no episode of rollout workers {workers} made progress for {self.quiet_s:g} s"
                )
        return [played for part in ray.get(list(refs), timeout=60) for played in part]

    def demonstrate(self, indices: Sequence[int], progress: float) -> list[ObjectRef[list[Played]]]:
        """Return references for `played`, one per worker."""
        shares = zip(self.workers, self._share(indices), strict=True)
        return [call(worker, RolloutWorker.demonstrate, share, progress) for worker, share in shares]

    def stop(self, timeout_s: float = 60.0) -> None:
        """Stop all workers: end their episodes, sandboxes and clients."""
        ray.get([call(worker, RolloutWorker.stop) for worker in self.workers], timeout=timeout_s)
