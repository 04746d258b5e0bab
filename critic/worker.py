"""The critic's training process: values and value updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from buffer.types import Grid
from critic.config import CriticConfig
from critic.head import ValueHead
from trainer import losses
from trainer.batching import MicroBatch
from trainer.worker import Fields, MegatronWorker, WorkerSettings


class CriticWorker(MegatronWorker):
    """A shard of the critic: the policy's architecture and first weights with a scalar head."""

    def __init__(self, settings: WorkerSettings, config: CriticConfig) -> None:
        super().__init__(settings)
        self.config = config
        self.value_head_std = config.head_init_std

    def _output_layer(self) -> Any:
        return lambda config: ValueHead(config, self.config.head_init_std, self.settings.seed)

    def _forward(self, batch: MicroBatch, gpt: Any) -> torch.Tensor:
        """Value of the state before each predicted token."""
        out = gpt(batch.tokens_1P, batch.packing.position_T[None], None, packed_seq_params=batch.packing)
        return out[0, :, 0]

    def values(self, refs: Sequence[Any], grid: Grid) -> dict[int, Any]:
        """Values, float32 [T] a sub-trace: index t holds the value of the state before token t."""
        return self.predict(refs, grid)

    def _value_loss(self, out_P: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        f, mask_P = batch.fields, batch.action_P
        each_P = losses.value(out_P, f["values"], f["returns"], self.config.value_clip)
        loss = torch.where(mask_P, each_P, torch.zeros_like(out_P)).sum()
        return loss, {"loss": loss.detach(), "tokens": mask_P.sum()}

    def update(self, refs: Sequence[Any], fields: Fields, grids: Sequence[Grid]) -> dict[str, Any]:
        """Value steps, one for each grid. `fields`: returns and (old) values, by sub-trace index."""
        return self._update(refs, fields, grids, self._value_loss)
