"""Restart of the training roles within a job.

    a rank dies -> kill all ranks -> start new ones -> new weight group -> newest checkpoint -> publish -> steps

A rank's death leaves the others useless: they wait for it in collectives, and policy and critic must be of one step.
So every training process is replaced, and the run repeats the steps after its newest checkpoint. Engines and rollout
workers stay. The death of the data buffer is handled in the same way, since its state is part of a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from launch.deaths import ProcessDied, actor_id
from slime import checkpoint

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from buffer.handle import BufferHandle
    from launch.supervisor import Supervisor
    from rollout.engines.server import EngineServer
    from rollout.worker import RolloutWorker
    from slime.run import Roles, Run

MAX_RESTARTS = 3  # without a new checkpoint in between


@dataclass(frozen=True)
class Builder:
    """Constructs processes of a run once more, on the same places."""

    engine: Callable[[int], ActorHandle[EngineServer]]  # by its number; it begins to start
    worker: Callable[[int], ActorHandle[RolloutWorker]]  # by its number; not started
    roles: Callable[[], Roles]  # started, and all of them answer
    buffer: Callable[[], BufferHandle]


class Restarts:
    """Restarts the training roles of one run."""

    def __init__(
        self, run: Run, builder: Builder, supervisor: Supervisor, run_dir: Path, note: Callable[[str], None]
    ) -> None:
        """Prepare restarts. `run_dir` holds the checkpoints; `note` tells the user a line."""
        self._run = run
        self._builder = builder
        self._supervisor = supervisor
        self._run_dir = run_dir
        self._note = note
        self._deaths: list[ProcessDied] = []  # since the checkpoint of step `_since`
        self._since = -1

    def restart(self, death: ProcessDied) -> int:
        """Replace all training processes, without their state, and return the step to go on from.

        RuntimeError: this is one restart too many since the newest checkpoint.
        """
        began, step = time.monotonic(), next(reversed(checkpoint.steps(self._run_dir)), 0)
        self._count(death, step)
        again = f"the steps after step {step}" if step else "the run from its beginning"
        self._note(f"{death}; all training processes start again and repeat {again}")
        run, supervisor = self._run, self._supervisor
        actors = [actor for role in run.models.groups for actor in role.actors]
        buffer_died = actor_id(run.buffer.actor) in {death.actor_id, *(one.actor_id for one in supervisor.deaths)}
        supervisor.forget([*actors, run.buffer.actor] if buffer_died else actors)
        for actor in actors:
            ray.kill(actor)
        if buffer_died:
            run.buffer = self._builder.buffer()
        run.models = self._builder.roles()
        run.weights.use_policy(run.models.policy, run.models.groups)
        run.recovery.count("recovery/restarts")
        self._note(f"all training processes started again in {time.monotonic() - began:.0f} s")
        return step

    def _count(self, death: ProcessDied, step: int) -> None:
        if step != self._since:
            self._deaths, self._since = [], step
        self._deaths.append(death)
        if len(self._deaths) > MAX_RESTARTS:
            reasons = "; ".join(str(one) for one in self._deaths)
            since = f"since the checkpoint of step {step}" if step else "before the first checkpoint"
            raise RuntimeError(f"training processes died {len(self._deaths)} times {since}: {reasons}")
