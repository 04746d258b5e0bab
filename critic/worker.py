"""The critic's training process: values and value updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from buffer.types import Float32, Grid, SubTrace
from critic.config import CriticConfig
from critic.head import ValueHead
from trainer import losses
from trainer.batching import MicroBatch
from trainer.worker import Fields, MegatronWorker, WorkerSettings, fetch

Sums = dict[str, torch.Tensor]


class CriticWorker(MegatronWorker):
    """A shard of the critic: the policy's architecture and first weights with a scalar head."""

    def __init__(self, settings: WorkerSettings, config: CriticConfig) -> None:
        super().__init__(settings)
        self.config = config
        self.value_head_std = config.head_init_std
        self.freeze = config.freeze

    def _output_layer(self) -> Any:
        return lambda config: ValueHead(config, self.config.head_init_std, self.settings.seed, self.config.value_range)

    def values(self, refs: Sequence[Any], grid: Grid) -> dict[int, Float32]:
        """Values, float32 [T] a sub-trace: index t holds the value of the state before token t."""
        return self.predict(refs, grid)

    def values_and_end(self, refs: Sequence[Any], grid: Grid) -> dict[int, Float32]:
        """The same and the value of the state after the last token, float32 [T + 1]."""
        own = fetch(refs, self._own_row(grid))
        longer = [one_longer(own[i]) if i in own else None for i in range(len(refs))]
        return self.predict(longer, grid)

    def _value_loss(self, out_1P: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, Sums, Sums]:
        """`out_1P`: value of the state before each predicted token."""
        f, mask_P = batch.fields, batch.action_P
        loss_P, clipped_P = losses.value(out_1P[0], f["values"], f["returns"], self.config.value_clip)
        loss = torch.where(mask_P, loss_P, 0.0).sum()
        sums = {"loss": loss.detach(), "clip_fraction": (clipped_P & mask_P).sum(), "tokens": mask_P.sum()}
        return loss, sums, {}

    def update(self, refs: Sequence[Any], fields: Fields, grids: Sequence[Grid]) -> dict[str, Any]:
        """Value steps, one for each grid. `fields`: returns and (old) values, by sub-trace index."""
        return self._update(refs, fields, grids, self._value_loss)


def one_longer(trace: SubTrace) -> SubTrace:
    """The sub-trace with any token after its end: what is predicted for that one is read after all the others."""
    return replace(
        trace,
        tokens=np.append(trace.tokens, trace.tokens[-1]),
        action_mask=np.append(trace.action_mask, False),
    )
