"""The critic's loss."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trainer.losses.token import require_same_shape


class ValueLoss(NamedTuple):
    """The result of the value loss for each token."""

    loss_T: torch.Tensor  # differentiable in the values
    clipped_T: torch.Tensor  # bool: True = the clip removed the gradient


def value(values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, clip: float) -> ValueLoss:
    """Return half the squared error; with clip > 0 the larger of the clipped and the unclipped one.

    Sources: PPO2; VC-PPO, arXiv 2503.01491.

        l = 1/2 (v - ret)^2
        l = 1/2 max((v - ret)^2, (v_old + clip(v - v_old, -c, c) - ret)^2)     with c = clip > 0

        dl/dv = v - ret, or 0 where the second term is larger: v moved toward the return by more than c

    A value that moved away from its return, or past it and farther than the bound, has its whole gradient. If both
    terms are equal, the first one is used. v, v_old (before the step's first update), ret: [T], in units of reward.

    ValueError: shapes differ; a clip that is negative or NaN.
    """
    require_same_shape(values=values_T, old_values=old_values_T, returns=returns_T)
    if not clip >= 0:
        raise ValueError(f"value clip={clip}: must be at least 0; 0 means no clip")
    error_T = (values_T - returns_T) ** 2
    if clip == 0:
        return ValueLoss(0.5 * error_T, torch.zeros_like(error_T, dtype=torch.bool))
    moved_T = values_T.detach() - old_values_T
    # Use the value itself inside the window: old + moved may differ in the last bit and give the larger error.
    near_T = torch.where(moved_T.abs() <= clip, values_T.detach(), old_values_T + moved_T.clamp(-clip, clip))
    near_error_T = (near_T - returns_T) ** 2
    clipped_T = near_error_T > error_T
    return ValueLoss(0.5 * torch.where(clipped_T, near_error_T, error_T), clipped_T)
