"""A typed handle to all rollout workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayActorError

from machine.actors import call
from machine.waits import answers, numbered, overdue
from rollout.worker import Played, RolloutWorker, Tickets

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

NAME = "rollout worker"
POLL_S = 1.0
TOLD_TIMEOUT_S = 60.0  # for a call that waits for nothing


class RolloutGroup:
    """All rollout workers of a run."""

    def __init__(self, workers: Sequence[ActorHandle[RolloutWorker]], quiet_s: float) -> None:
        """`quiet_s`: a wait fails when no episode makes progress for this long. Single episodes have no time limit."""
        self.workers = list(workers)
        self.quiet_s = quiet_s
        self._running: list[ObjectRef[None]] = []
        self._urls: Sequence[str] | None = None  # of the engines, if they are not those that the workers began with

    def start(self) -> list[ObjectRef[None]]:
        """Start every worker; return references that are ready when the workers have loaded what they need."""
        return [call(worker, RolloutWorker.start) for worker in self.workers]

    def started(self, starting: Sequence[ObjectRef[None]], timeout_s: float) -> None:
        """Wait for the references that `start` returned. TimeoutError names the workers that are late."""
        answers("start", numbered(NAME, self.workers), starting, timeout_s)

    def run(self, buffer: Tickets) -> None:
        """Start playing the buffer's tickets on every worker."""
        self._running = [call(worker, RolloutWorker.run, buffer) for worker in self.workers]

    def set_engines(self, urls: Sequence[str]) -> None:
        """Let every worker use exactly the engines at `urls` from now on. A worker that has died is left out."""
        self._urls = list(urls)
        asked = [call(worker, RolloutWorker.set_engines, urls) for worker in self.workers]
        for (name, worker), told in zip(numbered(NAME, self.workers).items(), asked, strict=True):
            with contextlib.suppress(RayActorError):
                answers("set_engines", {name: worker}, [told], TOLD_TIMEOUT_S)

    def replace(self, number: int, worker: ActorHandle[RolloutWorker], buffer: Tickets) -> None:
        """Put a worker that has started in the place of one that has died, and let it play the buffer's tickets."""
        if self._urls is not None:
            told = call(worker, RolloutWorker.set_engines, self._urls)
            answers("set_engines", {f"{NAME} {number}": worker}, [told], TOLD_TIMEOUT_S)
        self.workers[number] = worker
        if self._running:
            self._running[number] = call(worker, RolloutWorker.run, buffer)

    def check(self) -> None:
        """Raise the error of a worker whose loop has ended; a loop should end only when stopped.

        The death of a worker is not raised: the supervisor finds it.
        """
        ended, _ = ray.wait(self._running, num_returns=len(self._running), timeout=0)
        for ref in ended:
            with contextlib.suppress(RayActorError):
                ray.get(ref)

    def _share(self, indices: Sequence[int]) -> list[list[int]]:
        return [list(indices[k :: len(self.workers)]) for k in range(len(self.workers))]

    def evaluate(self, indices: Sequence[int], keep: int, waiting: Callable[[], None] = lambda: None) -> list[Played]:
        """Return held-out episodes, played with training's settings; about `keep` of them include their sub-traces.

        Call `waiting` every `POLL_S` until they are played. If it replaces a worker that has died, the new one plays
        the share of the old one again.
        """
        each, shares = -(-keep // len(self.workers)), self._share(indices)

        def ask(number: int) -> ObjectRef[list[Played]]:
            return call(self.workers[number], RolloutWorker.evaluate, shares[number], each)

        return self.played([ask(number) for number in range(len(shares))], "evaluation", waiting, ask)

    def played(
        self,
        refs: Sequence[ObjectRef[list[Played]]],
        what: str,
        waiting: Callable[[], None] = lambda: None,
        ask_again: Callable[[int], ObjectRef[list[Played]]] | None = None,
    ) -> list[Played]:
        """Return the requested episodes; `refs` has one reference per worker. A worker's error is raised at once.

        `ask_again` repeats the request to a worker, by its number, after the worker has died and was replaced.
        TimeoutError: for `quiet_s`, no worker received an engine's answer or ended an episode.
        """
        found: dict[int, list[Played]] = {}
        pending = dict(enumerate(refs))
        lost: dict[int, ActorHandle[RolloutWorker]] = {}  # number -> the worker that died
        before = -1
        asked: list[ObjectRef[int]] = []
        deadline = time.monotonic() + self.quiet_s
        while pending or lost:
            if not pending:
                time.sleep(POLL_S)
            done = ray.wait(list(pending.values()), num_returns=len(pending), timeout=POLL_S)[0] if pending else []
            for number in [number for number, ref in pending.items() if ref in done]:
                try:
                    found[number] = ray.get(pending.pop(number), timeout=60)
                except RayActorError:
                    if ask_again is None:
                        raise
                    lost[number] = self.workers[number]
            waiting()
            for number in [number for number, worker in lost.items() if self.workers[number] is not worker]:
                del lost[number]
                assert ask_again is not None
                pending[number] = ask_again(number)
            asked = asked or [call(worker, RolloutWorker.progress) for worker in self.workers]
            if len(ray.wait(asked, num_returns=len(asked), timeout=0)[0]) == len(asked):
                now, asked = sum(map(_answered, asked)), []
                if now != before:
                    before, deadline = now, time.monotonic() + self.quiet_s
            if (pending or lost) and time.monotonic() > deadline:
                late = {f"{NAME} {number}": self.workers[number] for number in sorted({*pending, *lost})}
                raise overdue(f"{what}, in which no episode made progress", late, self.quiet_s)
        return [played for number in sorted(found) for played in found[number]]

    def demonstrate(self, indices: Sequence[int], progress: float) -> list[ObjectRef[list[Played]]]:
        """Return references for `played`, one per worker."""
        shares = zip(self.workers, self._share(indices), strict=True)
        return [call(worker, RolloutWorker.demonstrate, share, progress) for worker, share in shares]

    def stop(self, timeout_s: float = 60.0) -> None:
        """Stop all workers: end their episodes, sandboxes and clients."""
        stopping = [call(worker, RolloutWorker.stop) for worker in self.workers]
        answers("stop", numbered(NAME, self.workers), stopping, timeout_s)


def _answered(progress: ObjectRef[int]) -> int:
    """Return a worker's counter; 0 if the worker has died."""
    try:
        return ray.get(progress, timeout=60)
    except RayActorError:
        return 0
