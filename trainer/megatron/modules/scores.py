"""Log-probabilities and entropies of a vocabulary projection that is never stored whole.

The logits of 32,768 tokens over 151,936 ids take 20 GB in float32, and their backward pass needs them several times.
So the projection, the softmax and the scores are computed for one slice of the tokens at a time, and again in the
backward pass; only if all logits fit into one slice are they stored:

    z = h W^T,  log p_v = z_v - log sum_u e^{z_u}        score_0 = log p_y,  score_1 = H = -sum_v p_v log p_v
    d score_0 / d z_v = [v = y] - p_v                    d score_1 / d z_v = -p_v (log p_v + H)

P = predictions of a micro-batch, V = this rank's rows of the (padded) vocabulary, H = hidden size, C = tokens of a
slice. Sums over v run over the rows of all tensor-parallel ranks, without padding rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F

SLICE_BYTES = 1 << 30  # most bytes of float32 logits stored at a time
CPU_TOKENS = 1024  # most tokens of a slice: their logits over a small vocabulary fit into caches
SMALLEST = torch.finfo(torch.float32).min


def slice_tokens(rows: int, cuda: bool) -> int:
    """Return the number of tokens of a slice, a multiple of 128, whose float32 logits fit into `SLICE_BYTES`."""
    tokens = max(128, SLICE_BYTES // (4 * rows) // 128 * 128)
    return tokens if cuda else min(tokens, CPU_TOKENS)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled into few kernels on GPUs, and unchanged on CPUs, where that would need a compiler."""
    return torch.compile(function, dynamic=True) if torch.cuda.is_available() else function


def _real(z_CV: torch.Tensor, num_real: int) -> torch.Tensor:
    """Return float32 logits with the rows from `num_real` on set to the smallest number."""
    z_CV = z_CV.float()
    if num_real == z_CV.shape[1]:
        return z_CV
    return z_CV.masked_fill(torch.arange(z_CV.shape[1], device=z_CV.device) >= num_real, SMALLEST)


@fused
def _largest(z_CV: torch.Tensor, num_real: int) -> torch.Tensor:
    return _real(z_CV, num_real).amax(1)


@fused
def _sums(z_CV: torch.Tensor, largest_C: torch.Tensor, labels_C: torch.Tensor, num_real: int) -> torch.Tensor:
    """Return [3, C]: sum e^x, sum x e^x and x_y, with x = z - largest; a label in another rank's rows adds 0."""
    x_CV = _real(z_CV, num_real) - largest_C[:, None]
    e_CV = x_CV.exp()
    own_C = (labels_C >= 0) & (labels_C < num_real)
    x_y_C = x_CV.gather(1, labels_C.clamp(0, num_real - 1)[:, None])[:, 0]
    weighted_C = torch.where(e_CV > 0, e_CV * x_CV, 0.0).sum(1)
    return torch.stack([e_CV.sum(1), weighted_C, torch.where(own_C, x_y_C, 0.0)])


@fused
def _slope(
    z_CV: torch.Tensor,
    log_total_C: torch.Tensor,
    entropy_C: torch.Tensor,
    labels_C: torch.Tensor,
    grad_2C: torch.Tensor,
    num_real: int,
) -> torch.Tensor:
    """Return the gradient with respect to the logits, in their dtype."""
    log_p_CV = _real(z_CV, num_real) - log_total_C[:, None]
    p_CV = log_p_CV.exp()
    at_label_CV = torch.arange(z_CV.shape[1], device=z_CV.device) == labels_C[:, None]
    slope_CV = grad_2C[0][:, None] * (at_label_CV.float() - p_CV)
    slope_CV = slope_CV - torch.where(p_CV > 0, grad_2C[1][:, None] * p_CV * (log_p_CV + entropy_C[:, None]), 0.0)
    return slope_CV.to(z_CV.dtype)


class _Scores(torch.autograd.Function):
    """The scores with their gradient; see the top of this file.

    Hidden [P, H], weight [V, H], labels int64 [P] relative to this rank's first row.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_PH: torch.Tensor, weight_VH: torch.Tensor, labels_P: torch.Tensor, num_real: int, group: Any
    ) -> torch.Tensor:
        scores, totals, kept = [], [], []
        rows = weight_VH.shape[0]
        ctx.size = slice_tokens(rows, hidden_PH.is_cuda)
        keeps = any(ctx.needs_input_grad) and 4 * len(hidden_PH) * rows <= SLICE_BYTES
        for hidden_CH, labels_C in zip(hidden_PH.split(ctx.size), labels_P.split(ctx.size), strict=True):
            z_CV = F.linear(hidden_CH, weight_VH)
            if keeps:
                kept.append(z_CV)
            largest_C = _largest(z_CV, num_real)
            if group.size() > 1:
                dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=group)
            sums_3C = _sums(z_CV, largest_C, labels_C, num_real)
            if group.size() > 1:
                dist.all_reduce(sums_3C, group=group)
            log_total_C = sums_3C[0].log()
            scores.append(torch.stack([sums_3C[2] - log_total_C, log_total_C - sums_3C[1] / sums_3C[0]]))
            totals.append(largest_C + log_total_C)
        scores_2P = torch.cat(scores, 1)
        ctx.save_for_backward(hidden_PH, weight_VH, labels_P, torch.cat(totals), scores_2P[1].contiguous(), *kept)
        ctx.num_real = num_real
        return scores_2P

    @staticmethod
    def backward(ctx: Any, grad_2P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        hidden_PH, weight_VH, labels_P, log_total_P, entropy_P, *kept = ctx.saved_tensors
        grad_hidden_PH = torch.empty_like(hidden_PH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)  # the slices' gradients are summed in float32
        for number, start in enumerate(range(0, len(hidden_PH), ctx.size)):
            own = slice(start, start + ctx.size)
            hidden_CH = hidden_PH[own]
            z_CV = kept[number] if kept else F.linear(hidden_CH, weight_VH)
            slope_CV = _slope(
                z_CV, log_total_P[own], entropy_P[own], labels_P[own], grad_2P[:, own].contiguous(), ctx.num_real
            )
            del z_CV
            grad_hidden_PH[own] = slope_CV @ weight_VH
            grad_weight_VH += slope_CV.t() @ hidden_CH
        return grad_hidden_PH, grad_weight_VH.to(weight_VH.dtype), None, None, None


def scores(
    hidden_PH: torch.Tensor, weight_VH: torch.Tensor, labels_P: torch.Tensor, vocab: int, group: Any
) -> torch.Tensor:
    """Return float32 [2, P]: log-probability of each label, and entropy in nats of the distribution it is drawn from.

    `weight_VH` is this rank's slice in the tensor-parallel `group`; `vocab` is the number of real ids over all ranks.
    The gradient with respect to `hidden_PH` is this rank's summand of a sum over `group`.
    """
    rows = weight_VH.shape[0]
    first = group.rank() * rows
    num_real = max(1, min(rows, vocab - first))
    assert vocab > first, "a rank holds padding only"
    result: torch.Tensor = _Scores.apply(hidden_PH, weight_VH, labels_P - first, num_real, group)
    return result
