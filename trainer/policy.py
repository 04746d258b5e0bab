"""The policy's training process: log-probabilities, policy losses, weights for the engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from buffer.types import Grid
from trainer import losses
from trainer.batching import MicroBatch
from trainer.broadcast import broadcast, join_update_group
from trainer.config import Loss, PolicyConfig
from trainer.megatron import cpu, hf
from trainer.worker import Fields, LossFunction, MegatronWorker, WorkerSettings

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: E402


def vocab_logprobs(logits_PV: torch.Tensor, labels_P: torch.Tensor, vocab: int) -> torch.Tensor:
    """log softmax at the labels, float32 [P], from logits split over tensor-parallel ranks.

    Rows that pad the vocabulary to a multiple of the ranks are no tokens: they get no probability.
    """
    width = logits_PV.shape[1]
    padding = (parallel_state.get_tensor_model_parallel_rank() + 1) * width - vocab
    logits_PV = logits_PV.float()
    if padding > 0:
        real_V = torch.arange(width, device=logits_PV.device) < width - padding
        logits_PV = logits_PV.masked_fill(~real_V, torch.finfo(torch.float32).min)
    return -vocab_parallel_cross_entropy(logits_PV, labels_P)


class PolicyWorker(MegatronWorker):
    """A shard of the policy."""

    def __init__(self, settings: WorkerSettings, config: PolicyConfig) -> None:
        super().__init__(settings)
        self.config = config
        self.update_group: Any = None

    def _forward(self, batch: MicroBatch, gpt: Any) -> torch.Tensor:
        """Log-probability of each predicted token, at temperature 1."""
        logits_1PV = gpt(
            batch.tokens_1P, batch.packing.position_T[None], None, packed_seq_params=batch.packing
        )  # this rank's slice of the vocabulary
        return vocab_logprobs(logits_1PV[0], batch.labels_1P[0], self.shape.vocab)

    def logprobs(self, refs: Sequence[Any], grid: Grid) -> dict[int, Any]:
        """Log-probabilities under the present weights, float32 [T] a sub-trace."""
        return self.predict(refs, grid)

    def _policy_loss(self, out_P: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        c, f, mask_P = self.config, batch.fields, batch.action_P
        if c.loss is Loss.ppo:
            parts = losses.ppo(out_P, f["old_logprobs"], f["advantages"], c.clip_low, c.clip_high)
        else:
            parts = losses.dis(out_P, f["engine_logprobs"], f["advantages"], c.clip_low, c.clip_high)
        zero = torch.zeros_like(out_P)
        loss = torch.where(mask_P, parts.loss_T * f["weights"], zero).sum()
        log_ratio_P = torch.where(mask_P, parts.ratio_T.log(), zero)
        sums = {
            "loss": loss.detach(),
            "clipped": (parts.clipped_T & mask_P).sum(),
            "kl": (log_ratio_P.exp() - 1 - log_ratio_P).sum(),  # k3 estimator (Schulman 2020)
            "tokens": mask_P.sum(),
        }
        return loss, sums

    def _sft_loss(self, out_P: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = torch.where(batch.action_P, losses.nll(out_P), torch.zeros_like(out_P)).sum()
        return loss, {"loss": loss.detach(), "tokens": batch.action_P.sum()}

    def update(self, refs: Sequence[Any], fields: Fields, grids: Sequence[Grid]) -> dict[str, Any]:
        """Policy-gradient steps, one for each grid.

        `fields`: advantages, weights, and old_logprobs (ppo) or engine_logprobs (dis), by sub-trace index.
        """
        loss: LossFunction = self._policy_loss
        return self._update(refs, fields, grids, loss)

    def imitate(self, refs: Sequence[Any], grids: Sequence[Grid]) -> dict[str, Any]:
        """Supervised steps on the action tokens, one for each grid."""
        return self._update(refs, {}, grids, self._sft_loss)

    def weight_names(self) -> list[tuple[str, str, list[int]]]:
        """(Hugging Face name, dtype, shape) of every tensor, in the order in which they are sent."""
        dtype = str(next(self.ddp.parameters()).dtype).removeprefix("torch.")
        return hf.weight_shapes(self.shape, dtype)

    def join_engines(self, host: str, port: int, world_size: int, name: str, timeout_s: float) -> None:
        """Rank 0 joins the group over which weights go to the engines; it is rank 0 there."""
        if dist.get_rank() == 0:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            self.update_group = join_update_group(host, port, 0, world_size, name, backend, timeout_s)

    def send_weights(self) -> int:
        """Broadcasts every tensor to the engines. All ranks call it (shards are gathered); returns bytes sent."""
        sent = 0
        for _, tensor in hf.export(self.ddp.module, self.shape):
            if self.update_group is not None:
                broadcast([tensor.contiguous()], self.update_group)
                sent += tensor.numel() * tensor.element_size()
        return sent

    def export(self, folder: str) -> None:
        """Writes a Hugging Face folder with the present weights (rank 0 writes, all ranks call)."""
        weights = dict(hf.export(self.ddp.module, self.shape))
        if dist.get_rank() == 0:
            hf.save(weights, Path(self.settings.model_folder), Path(folder))
        dist.barrier()
