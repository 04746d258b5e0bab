"""Common code of the losses: their result type, the clip window, checks, and the negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class TokenLoss(NamedTuple):
    """The result of a policy loss for each token."""

    loss_T: torch.Tensor  # differentiable in log pi_theta
    ratio_T: torch.Tensor  # the importance ratio, detached, before any clip
    clipped_T: torch.Tensor  # bool: True = the clip or mask acted on this token


def nll(logprobs_T: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood, the supervised loss: l = -log pi_theta."""
    return -logprobs_T


def clip_window(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Return the window of a ratio, (1 - clip_low, 1 + clip_high).

    There is no lower bound with clip_low >= 1 and no upper bound with clip_high = inf. ValueError: a negative or NaN
    clip.
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: both must be at least 0, the window contains 1")
    return 1.0 - clip_low, 1.0 + clip_high


def require_same_shape(**tensors: torch.Tensor) -> None:
    """Refuse named tensors of different shapes, which would broadcast. ValueError: two of them differ in shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{listed}: all must have the same shape, one number a token")


def require_finite(loss_T: torch.Tensor, mask_T: torch.Tensor, name_of: Callable[[int], str]) -> None:
    """Refuse a NaN or infinite loss before it becomes a gradient.

    `name_of(i)` returns the name of token i in messages. Only tokens with mask_T True are checked. ValueError: the
    message has the first bad token, its loss, and the number of bad tokens.
    """
    loss_T = loss_T.detach()
    bad_T = mask_T & ~loss_T.isfinite()
    if bad_T.any():
        bad = bad_T.nonzero()[:, 0].tolist()
        raise ValueError(
            f"{name_of(bad[0])}: the loss is {float(loss_T[bad[0]])} ({len(bad)} of {int(mask_T.sum())} "
            "action tokens): a log-probability is not finite, or exp of a log-ratio is beyond the range of its float; "
            "compare engine_logprobs and old_logprobs there, bound the ratio (dual_clip, cispo, dis), or lower the lr"
        )
