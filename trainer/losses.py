"""Losses per token. No reduction here: the worker sums them and divides by the global number of action tokens.

    L = sum over all action tokens of the optimizer step of w_i l_i / (number of those action tokens)

w_i = 1 for `loss_norm: token`. For `episode`, w_i = N / (E n_e) makes L the mean over the E episodes
of each episode's mean over its n_e action tokens. Prompts, tool output and copied context are in no sum.

Shapes: every argument is float32 [T]; A is the advantage, a constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLoss(NamedTuple):
    loss_T: torch.Tensor
    ratio_T: torch.Tensor  # detached
    clipped_T: torch.Tensor  # bool: where the clip or mask removed the gradient


def ppo(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """Clipped surrogate (Schulman et al. 2017, arXiv 1707.06347; asymmetric clip: DAPO, arXiv 2503.14476).

    r = pi_theta / pi_old;  l = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    """
    ratio_T = (logprobs_T - old_logprobs_T).exp()
    bounded_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    plain_T, clipped_T = -ratio_T * advantages_T, -bounded_T * advantages_T
    return TokenLoss(torch.maximum(plain_T, clipped_T), ratio_T.detach(), clipped_T > plain_T)


def dis(
    logprobs_T: torch.Tensor,
    engine_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """Double-sided importance mask (SAO, arXiv 2607.07508): needs no pi_old.

    x = pi_theta / mu, mu the engine's probability;  l = -sg[f(x) A] log pi_theta,
    f(x) = x for 1 - clip_low < x < 1 + clip_high, else 0. Masked tokens stay in the denominator.
    """
    ratio_T = (logprobs_T - engine_logprobs_T).exp().detach()
    inside_T = (ratio_T > 1.0 - clip_low) & (ratio_T < 1.0 + clip_high)
    weight_T = torch.where(inside_T, ratio_T, torch.zeros_like(ratio_T))
    return TokenLoss(-weight_T * advantages_T * logprobs_T, ratio_T, ~inside_T)


def nll(logprobs_T: torch.Tensor) -> torch.Tensor:
    """Supervised loss: l = -log pi_theta."""
    return -logprobs_T


def value(values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, clip: float) -> torch.Tensor:
    """Half squared error; with clip > 0 the larger of clipped and unclipped (PPO2).

    l = 1/2 max((v - ret)^2, (v_old + clip(v - v_old, -clip, clip) - ret)^2)
    """
    error_T = (values_T - returns_T) ** 2
    if clip > 0:
        near_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
        error_T = torch.maximum(error_T, (near_T - returns_T) ** 2)
    return 0.5 * error_T
