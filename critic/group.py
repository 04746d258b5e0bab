"""The typed handle through which the loop calls the critic's ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from buffer.types import Batch, Targets, TokenColumn
from critic.config import CriticConfig
from critic.worker import CriticWorker
from trainer.group import Pending, WorkerGroup

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class CriticGroup(WorkerGroup):
    """The critic's ranks."""

    def __init__(self, actors: Sequence[ActorHandle[CriticWorker]], config: CriticConfig, timeout_s: float) -> None:
        super().__init__("critic", actors, config, timeout_s)
        self.config = config

    def values(self, batch: Batch, beyond: bool = False) -> Pending[TokenColumn]:
        """Return the value of the state before each token, float32 [T] for each sub-trace of a batch by its index.

        With `beyond`, [T + 1]: the last entry is the value of the state after the last token.
        """
        return self.predict(CriticWorker.values_and_end if beyond else CriticWorker.values, batch)

    def update(
        self, batch: Batch, targets: Sequence[Targets], rng: np.random.Generator, num_epochs: int | None = None
    ) -> Pending[dict[str, float]]:
        """Start the critic's optimizer steps of one training step: K epochs over the batch."""
        columns = {
            "returns": TokenColumn((i, target.returns) for i, target in enumerate(targets)),
            "values": TokenColumn((i, target.values) for i, target in enumerate(targets)),
        }
        grids = (
            self.minibatch_grids(batch, self.config.num_minibatches, rng)
            for _ in range(num_epochs or self.config.num_epochs)
        )
        return self.train(CriticWorker.update, batch, ((columns, of_epoch) for of_epoch in grids))
