"""The critic's training process: values and value updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from buffer.types import Grid, SubTrace, TokenColumn
from critic.config import CriticConfig
from critic.head import value_head
from trainer import losses
from trainer.batching import MicroBatch
from trainer.engine import EngineSettings, MakeEngine, Memory, SummedLoss, megatron, needs
from trainer.worker import UpdateResult, Worker, fetch


class CriticWorker(Worker):
    """A shard of the critic: the policy's architecture and first weights with a scalar head."""

    def __init__(self, settings: EngineSettings, config: CriticConfig, make_engine: MakeEngine = megatron) -> None:
        super().__init__(make_engine(settings, value_head(config.head_init_std, config.value_range), config.freeze))
        self.config = config

    @needs(Memory.weights)
    def values(self, refs: Sequence[Any], grid: Grid) -> TokenColumn:
        """Return values, float32 [T] a sub-trace: index t holds the value of the state before token t."""
        return self._predict(refs, grid)

    @needs(Memory.weights)
    def values_and_end(self, refs: Sequence[Any], grid: Grid) -> TokenColumn:
        """Return the same with the value of the state after the last token appended, float32 [T + 1] a sub-trace."""
        own = fetch(refs, grid[self.engine.share.row])
        longer = [one_longer(own[i]) if i in own else None for i in range(len(refs))]
        return self._predict(longer, grid)

    def _value_loss(self, out_1P: torch.Tensor, batch: MicroBatch) -> SummedLoss:
        """Return the value loss. `out_1P`: value of the state before each predicted token."""
        f, mask_P = batch.columns, batch.action_P
        loss_P, clipped_P = losses.value(out_1P[0], f["values"], f["returns"], self.config.value_clip)
        loss = torch.where(mask_P, loss_P, 0.0).sum()
        sums = {"loss": loss.detach(), "clip_fraction": (clipped_P & mask_P).sum(), "tokens": mask_P.sum()}
        return SummedLoss(loss, sums, {})

    @needs(Memory.weights, Memory.gradients)
    def update(self, refs: Sequence[Any], columns: Sequence[Any], grids: Sequence[Grid]) -> UpdateResult:
        """Take one value step for each grid. `columns`: returns and old values for each data-parallel row."""
        return self._update(refs, self._own(columns), grids, self._value_loss)


def one_longer(trace: SubTrace) -> SubTrace:
    """Return the sub-trace with one arbitrary token appended: its prediction is the value after the last real token."""
    return replace(
        trace,
        tokens=np.append(trace.tokens, trace.tokens[-1]),
        action_mask=np.append(trace.action_mask, False),
    )
