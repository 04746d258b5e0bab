"""The objects of a run, under the names that the loop uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ray.actor import ActorHandle
from ray.exceptions import RayError

from buffer.handle import BufferHandle
from buffer.types import Batch, Float32, Scores, SubTrace, Targets
from critic.estimators import Estimator
from machine.actors import call
from machine.waits import answers, numbered
from rollout.engines.group import EngineGroup
from rollout.engines.server import EngineServer
from rollout.group import RolloutGroup
from slime.observe.clock import Clock
from slime.observe.failures import Failures
from slime.recovery.recovery import Recovery
from slime.weights import Weights
from trainer.group import NoReference, PolicyGroup, WorkerGroup


class Abandoned(Exception):
    """A step was abandoned before it changed anything, because the run was told to end."""


@dataclass(frozen=True)
class Roles:
    """The groups of processes that hold a model."""

    policy: PolicyGroup
    reference: PolicyGroup | NoReference
    estimator: Estimator

    @property
    def groups(self) -> list[WorkerGroup]:
        """Return all groups, including frozen ones."""
        frozen = [self.reference] if isinstance(self.reference, PolicyGroup) else []
        return [self.policy, *frozen, *self.estimator.roles]


STOP_TIMEOUT_S = 30.0  # for engines and sandboxes; processes that are left then end with their actor


@dataclass
class Run:
    """The objects that slime/build.py constructs. It also chooses their classes."""

    buffer: BufferHandle
    rollout: RolloutGroup
    engines: EngineGroup
    models: Roles
    weights: Weights
    servers: list[ActorHandle[EngineServer]]
    model_folder: Path  # model that the run starts from
    rows: str  # digest of the rows to train on
    clock: Clock = field(default_factory=Clock)  # of the current step
    told_to_end: Callable[[], bool] = lambda: False
    recovery: Recovery = field(default_factory=Recovery)
    _playing: BufferHandle | None = None  # buffer whose tickets are played

    @property
    def policy(self) -> PolicyGroup:
        """Return the policy's processes."""
        return self.models.policy

    @property
    def reference(self) -> PolicyGroup | NoReference:
        """Return the processes of the frozen starting model."""
        return self.models.reference

    @property
    def estimator(self) -> Estimator:
        """Return the source of advantages, which may have processes."""
        return self.models.estimator

    @property
    def roles(self) -> list[WorkerGroup]:
        """Return the groups of processes that train. A checkpoint stores their state."""
        return [self.policy, *self.estimator.roles]

    def play(self) -> None:
        """Let the rollout workers play the buffer's tickets, unless they do so already."""
        if self._playing is not self.buffer:
            self.rollout.run(self.buffer)
            self._playing = self.buffer

    def score(self, batch: Batch) -> Scores:
        """Return values and log-probabilities of a batch under the current weights; the roles work in parallel."""
        with self.clock.phase("values"):
            self.weights.lend_memory()
            asked = self.estimator.ask(batch), self.policy.logprobs(batch), self.reference.logprobs(batch)
            return Scores(asked[0].result(), asked[1].result(), asked[2].result())

    def update(
        self,
        batch: Batch,
        sub_traces: Sequence[SubTrace],
        targets: Sequence[Targets],
        scores: Scores,
        corrections: Sequence[Float32],
        rngs: tuple[np.random.Generator, np.random.Generator],
    ) -> dict[str, float]:
        """Update policy and estimator in parallel and return the metrics `policy/...` and `critic/...`.

        `corrections`: weights of every token's policy loss. `rngs`: generators for the minibatches of the policy and
        of the estimator.
        """
        with self.clock.phase("update"):
            updating = (
                self.estimator.update(batch, targets, rngs[1]),
                self.policy.update(batch, sub_traces, targets, scores, corrections, rngs[0]),
            )
            found = {f"critic/{name}": number for name, number in updating[0].result().items()}
            return found | {f"policy/{name}": number for name, number in updating[1].result().items()}

    def publish(self, step: int) -> None:
        """Publish the policy's weights to the running engines as version `step`."""
        with self.clock.phase("publish"):
            self.recovery.check()
            self.send_weights(step)

    def send_weights(self, version: int) -> None:
        """Publish the policy's weights; if an engine dies meanwhile, publish them to the others again."""
        while True:
            try:
                self.weights.publish(version)
            except (RuntimeError, TimeoutError, RayError):
                if not self.recovery.engine_died():
                    raise
                self.recovery.check()
            else:
                self.recovery.joined()
                return

    def abandon_if_told(self) -> None:
        """Raise `Abandoned` if the run was told to end. Call this only before a step changes anything."""
        if self.told_to_end():
            raise Abandoned

    def check(self) -> None:
        """Raise the error of a rollout worker's loop, and handle the deaths of processes.

        Call this in every wait in which the policy holds the weights that were published last.
        """
        self.recovery.check()
        if self.recovery.joining:
            self.send_weights(self.weights.version)
        self.rollout.check()

    def peak_memory(self) -> dict[str, float]:
        """Return the metric `<role>/peak_memory_gb` of every role that holds a model."""
        return {name: gb for role in self.models.groups for name, gb in role.peak_memory().items()}

    def stop(self, failures: Failures) -> None:
        """Stop engines and sandboxes; the shutdown of Ray ends the remaining processes."""
        with failures.aside("stopping the rollout workers"):
            self.rollout.stop(STOP_TIMEOUT_S)
        with failures.aside("stopping the engines"):
            stopping = [call(server, EngineServer.stop) for server in self.servers]
            answers("stop", numbered("engine", self.servers), stopping, STOP_TIMEOUT_S)
