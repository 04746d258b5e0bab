"""The policy's training process: log-probabilities, policy losses, and weights for the engines."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from buffer.types import Grid, TokenColumn
from trainer import losses
from trainer.batching import MicroBatch
from trainer.columns import TOKEN_KINDS
from trainer.config import PolicyConfig
from trainer.engine import EngineSettings, MakeEngine, Memory, SummedLoss, megatron, needs
from trainer.losses import TokenLoss
from trainer.models.folder import write_folder
from trainer.publish.broadcast import UpdateGroup, Weight, buckets
from trainer.publish.delta import Base
from trainer.worker import UpdateResult, Worker

Sums = dict[str, torch.Tensor]


class PolicyWorker(Worker):
    """A shard of the policy."""

    def __init__(self, settings: EngineSettings, config: PolicyConfig, make_engine: MakeEngine = megatron) -> None:
        super().__init__(make_engine(settings, None, ()))
        self.settings = settings
        self.config = config
        self.update_group: UpdateGroup | None = None
        self.base: Base | None = None  # the weights that the engines hold, if only changes are sent

    @needs(Memory.weights)
    def logprobs(self, refs: Sequence[Any], grid: Grid) -> TokenColumn:
        """Return log-probabilities under the current weights, float32 [T] a sub-trace."""
        return self._predict(refs, grid)

    def _policy_loss(self, out_2P: torch.Tensor, batch: MicroBatch) -> SummedLoss:
        """Return the policy loss with its metrics.

        `out_2P`: log-probabilities at temperature 1, and entropies of the distributions that tokens were drawn from.
        """
        logprobs_P, entropy_P = out_2P
        f, mask_P = batch.columns, batch.action_P
        loss_P, _, _ = self._objective(logprobs_P, entropy_P, batch)
        losses.require_finite(loss_P, mask_P, batch.name_of)
        loss = loss_P.sum()
        # The same loss from a leaf: its gradient measures how strongly each token is pushed.
        leaf_P = logprobs_P.detach().requires_grad_()
        again_P, token_loss_P, extra = self._objective(leaf_P, entropy_P.detach(), batch)
        (push_P,) = torch.autograd.grad(again_P.sum(), leaf_P)
        zero = torch.zeros_like(push_P)
        moved_P = torch.where(mask_P, logprobs_P.detach() - f["old_logprobs"], zero)
        sums = {
            "loss": loss.detach(),
            "clip_fraction": (token_loss_P.clipped_T & mask_P).sum(),
            "ratio_mean": torch.where(mask_P, token_loss_P.ratio_T, zero).sum(),
            "kl": (torch.expm1(moved_P) - moved_P).sum(),  # k3 estimator of KL(pi_old || pi_theta), Schulman 2020
            "entropy": torch.where(mask_P, entropy_P.detach(), zero).sum(),
            "tokens": mask_P.sum(),
            **{name: number.detach() for name, number in extra.items()},
        }
        for number, name in enumerate(TOKEN_KINDS):
            sums[f"gradient/{name}"] = torch.where(mask_P & (f["kind"] == number), push_P.abs(), zero).sum()
        maxima = {"ratio_max": torch.where(mask_P, token_loss_P.ratio_T, zero).max()}
        return SummedLoss(loss, sums, maxima)

    def _objective(
        self, logprobs_P: torch.Tensor, entropy_P: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, TokenLoss, Sums]:
        """Return the weighted loss [P], 0 where nothing was sampled; its policy loss; sums of other terms."""
        c, f, mask_P = self.config, batch.columns, batch.action_P
        logprobs_P = torch.where(mask_P, logprobs_P, 0.0)  # tokens not sampled are in no sum and no gradient
        token_loss_P = token_loss(c, logprobs_P, batch)
        each_P = token_loss_P.loss_T * f["corrections"] if "corrections" in f else token_loss_P.loss_T
        extra: Sums = {}
        if "reference_logprobs" in f:
            each_P = each_P + c.kl_coef * losses.kl(logprobs_P, f["reference_logprobs"], c.kl)
        if c.entropy_coef:
            each_P = each_P - c.entropy_coef * entropy_P
        weighted_P = f["weights"] * each_P
        if "nll_weights" in f:
            nll_P = f["nll_weights"] * losses.nll(logprobs_P)
            weighted_P = weighted_P + nll_P
            extra["nll"] = torch.where(mask_P, nll_P, 0.0).sum()
        return torch.where(mask_P, weighted_P, 0.0), token_loss_P, extra

    def _sft_loss(self, out_2P: torch.Tensor, batch: MicroBatch) -> SummedLoss:
        loss = torch.where(batch.action_P, losses.nll(out_2P[0]), 0.0).sum()
        return SummedLoss(loss, {"loss": loss.detach(), "tokens": batch.action_P.sum()}, {})

    @needs(Memory.weights, Memory.gradients)
    def update(self, refs: Sequence[Any], columns: Sequence[Any], grids: Sequence[Grid]) -> UpdateResult:
        """Take one policy-gradient step for each grid. `columns`: of each data-parallel row (trainer/columns.py)."""
        return self._update(refs, self._own(columns), grids, self._policy_loss)

    @needs(Memory.weights, Memory.gradients)
    def imitate(self, refs: Sequence[Any], grids: Sequence[Grid]) -> UpdateResult:
        """Take one supervised step on the action tokens for each grid."""
        return self._update(refs, {}, grids, self._sft_loss)

    def weight_names(self) -> list[Weight]:
        """Return (Hugging Face name, dtype, shape) of every tensor, in the order in which they are sent."""
        return self.engine.weight_shapes()

    def join_engines(self, host: str, port: int, world_size: int, name: str, backend: str, timeout_s: float) -> None:
        """Join, on rank 0, the group over which weights go to the engines; this process is rank 0 of that group."""
        self.update_group = UpdateGroup(host, port, world_size, name=name, backend=backend, timeout_s=timeout_s)

    def leave_engines(self) -> None:
        """Leave the group over which weights go to the engines, on rank 0, if it is in one."""
        if self.update_group is not None:
            self.update_group.leave()
            self.update_group = None

    @needs(Memory.weights)
    def send_weights(self, changes: bool = False, keep_base: bool = False) -> int:
        """Broadcast the weights to the engines, one bucket at a time (`buckets` of `weight_names`); return bytes sent.

        All ranks call it: shards are gathered on rank 0, which holds one bucket at a time. `changes`: send only the
        elements that differ from the weights sent last; that call must have had `keep_base` or `changes` set.
        """
        tensors = self.engine.weights()
        if self.update_group is None:
            deque(tensors, maxlen=0)  # takes part in the gather
            return 0
        if keep_base and not changes:
            self.base = Base()
        try:
            return self.update_group.send(tensors, buckets(self.weight_names()), self.base, changes)
        finally:
            deque(tensors, maxlen=0)  # after an error, the other ranks still wait in the gather

    @needs(Memory.weights)
    def export(self, folder: str) -> None:
        """Write a Hugging Face folder with the current weights (rank 0 writes, all ranks call)."""
        weights = self.engine.weights()
        if self.settings.rank == 0:
            write_folder(weights, Path(self.settings.model_folder), Path(folder))
        else:
            deque(weights, maxlen=0)  # takes part in the gather


def token_loss(config: PolicyConfig, logprobs_P: torch.Tensor, batch: MicroBatch) -> TokenLoss:
    """Return the configured policy loss of every token; trainer/losses/algorithms/ has the formulas."""
    loss = losses.policy_loss(config.loss.value)
    arrays = [batch.columns[name] for name in loss.reads]
    sequences = (batch.sequence_P, batch.action_P, len(batch.lengths)) if loss.by_sequence else ()
    return loss.function(logprobs_P, *arrays, *sequences, *loss.settings(config))
