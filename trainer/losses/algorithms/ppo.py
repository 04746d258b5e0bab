"""Proximal policy optimization."""

from __future__ import annotations

import torch

from trainer.losses.registry import PolicyLoss, Window, register
from trainer.losses.token import TokenLoss, clip_window, require_same_shape


def ppo(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> TokenLoss:
    """Compute the clipped surrogate (Schulman et al. 2017, arXiv 1707.06347; asymmetric clip: DAPO, arXiv 2503.14476).

        r = pi_theta / pi_old
        l = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        l = min(l, -c A) where A < 0                             with c = dual_clip > 0 (arXiv 1912.09729)

        dl/dlog pi = -r A, or 0 where the clip acted:
            A > 0 and r > 1 + clip_high     A < 0 and r < 1 - clip_low     A < 0 and r > c > 0

    Exactly on a bound the gradient is not clipped. All tensors [T]; advantages and old log-probabilities are constants.

    exp(log-ratio) beyond the float's range (88 in float32): for A > 0 it is clipped like any large ratio, gradient 0;
    for A = 0 loss and gradient are 0; for A < 0 the loss is infinite (see `require_finite`) unless dual_clip bounds it.

    ValueError: shapes differ; a negative clip; dual_clip neither 0 nor above 1 (it would mask tokens at ratio 1).
    """
    require_same_shape(logprobs=logprobs_T, old_logprobs=old_logprobs_T, advantages=advantages_T)
    if dual_clip != 0 and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}: must be 0 (none) or above 1, e.g. 3")
    window = clip_window(clip_low, clip_high)
    return clipped_surrogate(logprobs_T - old_logprobs_T, advantages_T, *window, dual_clip)


def clipped_surrogate(
    log_ratio_T: torch.Tensor, advantages_T: torch.Tensor, low: float, high: float, dual_clip: float = 0.0
) -> TokenLoss:
    """Compute `ppo` from log r and the two bounds of the ratio."""
    ratio_T = log_ratio_T.detach().exp()
    plain_T = -ratio_T * advantages_T
    bound_T = -ratio_T.clamp(low, high) * advantages_T
    clipped_T = bound_T > plain_T
    if dual_clip:
        cap_T = -dual_clip * advantages_T
        capped_T = (advantages_T < 0) & (plain_T > cap_T)
        bound_T = torch.where(capped_T, cap_T, bound_T)
        clipped_T = clipped_T | capped_T
    # Tokens without a gradient must not reach exp: 0 * inf is NaN.
    without_T = clipped_T | ((advantages_T == 0) & ratio_T.isinf())
    moving_T = -torch.where(without_T, 0.0, log_ratio_T).exp() * advantages_T
    return TokenLoss(torch.where(clipped_T, bound_T, moving_T), ratio_T, clipped_T)


register(
    PolicyLoss(
        name="ppo",
        function=ppo,
        reads=("old_logprobs", "advantages"),
        ratio="r = pi_theta / pi_old",
        formula="-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)",
        source="arXiv 1707.06347; higher upper side: DAPO, arXiv 2503.14476",
        windows=(Window("0.2", "0.28", "0.8 to 1.28, the default"),),
        settings=lambda config: (config.clip_low, config.clip_high, config.dual_clip),
    )
)
