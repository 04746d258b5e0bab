"""Replacement of rollout workers that die, while training goes on.

Finished episodes belong to the data buffer and stay. Those in flight end with the worker: the buffer issues their
tickets again, and with the same seeds the same episodes are played. An evaluation plays the worker's share again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray

from launch.deaths import ProcessDied, actor_id
from machine.actors import call
from machine.failures import reason
from rollout.worker import RolloutWorker, worker_name
from slime.recovery.recovery import limit_deaths

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from slime.run import Run


@dataclass
class _Lane:
    worker: ActorHandle[RolloutWorker]
    starting: ObjectRef[None] | None = None
    began_s: float = 0.0
    deaths: list[str] = field(default_factory=list)  # since the last publication of weights


class WorkerReplacer:
    """Replaces the rollout workers of one run."""

    joining = False  # a worker needs no weights

    def __init__(
        self, run: Run, start: Callable[[int], ActorHandle[RolloutWorker]], note: Callable[[str], None]
    ) -> None:
        """Prepare replacements. `start` constructs a worker, by its number; `note` tells the user a line."""
        self._run = run
        self._start = start
        self._note = note
        self._lanes = [_Lane(worker) for worker in run.rollout.workers]
        self._numbers = {actor_id(worker): number for number, worker in enumerate(run.rollout.workers)}

    def replaces(self, death: ProcessDied) -> bool:
        """Return whether a rollout worker has died."""
        return death.actor_id in self._numbers

    def replace(self, death: ProcessDied) -> None:
        """Reissue the tickets of a dead worker and begin to start another one.

        RuntimeError: a worker at this place dies again and again.
        """
        number = self._numbers[death.actor_id]
        if death.actor_id == actor_id(self._lanes[number].worker):  # else it was replaced before its death was found
            self._replace(number, str(death))

    def advance(self) -> None:
        """Let workers that are ready play. RuntimeError: see `replace`."""
        for number, lane in enumerate(self._lanes):
            if lane.starting is None or not ray.wait([lane.starting], timeout=0)[0]:
                continue
            try:
                ray.get(lane.starting)
            except (RuntimeError, ray.exceptions.RayError) as error:
                self._replace(number, reason(error))
                continue
            lane.starting = None
            self._run.rollout.replace(number, lane.worker, self._run.buffer)
            self._run.recovery.count("recovery/workers")
            self._note(f"rollout worker {number} plays again after {time.monotonic() - lane.began_s:.0f} s")

    def joined(self) -> None:
        """Note a publication: a worker that dies from now on has worked."""
        for lane in self._lanes:
            if lane.starting is None:
                lane.deaths = []

    def _replace(self, number: int, why: str) -> None:
        lane = self._lanes[number]
        lane.deaths.append(why)
        limit_deaths(f"rollout worker {number}", lane.deaths)
        lost = self._run.buffer.lost(worker_name(number))
        self._note(f"{why}; {lost} episodes are played again, another rollout worker {number} is started")
        lane.worker = self._start(number)
        self._numbers[actor_id(lane.worker)] = number
        lane.starting, lane.began_s = call(lane.worker, RolloutWorker.start), time.monotonic()
