"""What the losses share: their answer, their clip window, their refusals, and the simplest of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class TokenLoss(NamedTuple):
    """What a policy loss says of each token."""

    loss_T: torch.Tensor  # differentiable in log pi_theta
    ratio_T: torch.Tensor  # the importance ratio that was looked at, detached, before any clip
    clipped_T: torch.Tensor  # bool: True = the clip or mask acted on this token


def nll(logprobs_T: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood, the supervised loss: l = -log pi_theta."""
    return -logprobs_T


def clip_window(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Return (1 - clip_low, 1 + clip_high): the window of a ratio. clip_low >= 1 or clip_high = inf: no bound on that
    side.

    ValueError: a clip that is negative or NaN.
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: both must be at least 0, the window contains 1")
    return 1.0 - clip_low, 1.0 + clip_high


def require_same_shape(**tensors: torch.Tensor) -> None:
    """Refuse tensors. ValueError: two of the named ones differ in shape (broadcasting would make numbers out of
    nothing).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{listed}: all must have the same shape, one number a token")


def require_finite(loss_T: torch.Tensor, mask_T: torch.Tensor, name_of: Callable[[int], str]) -> None:
    """Stop a NaN or infinite loss before it becomes a gradient.

    `name_of(i)` is what people call token i. Only tokens with mask_T True are looked at. ValueError: names the first
    bad token, its loss, and how many there are.
    """
    loss_T = loss_T.detach()
    bad_T = mask_T & ~loss_T.isfinite()
    if bad_T.any():
        places = bad_T.nonzero()[:, 0].tolist()
        raise ValueError(
            f"{name_of(places[0])}: the loss is {float(loss_T[places[0]])} ({len(places)} of {int(mask_T.sum())} "
            "action tokens): a log-probability is not finite, or exp of a log-ratio is beyond the range of its float; "
            "compare engine_logprobs and old_logprobs there, bound the ratio (dual_clip, cispo, dis), or lower the lr"
        )
