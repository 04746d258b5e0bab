"""Double-sided importance mask."""

from __future__ import annotations

import torch

from trainer.losses.registry import PolicyLoss, Window, register
from trainer.losses.token import TokenLoss, clip_window, require_same_shape


def dis(
    logprobs_T: torch.Tensor,
    engine_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """Compute the double-sided importance mask (SAO, arXiv 2607.07508), for asynchronous training; it needs no pi_old.

        x = pi_theta / mu, mu the engine's probability
        l = -sg[f(x) A] log pi_theta,    f(x) = x for 1 - clip_low < x < 1 + clip_high, else 0
        dl/dlog pi = -f(x) A

    A token on or outside either bound has neither loss nor gradient, whatever the sign of A, and counts in the
    denominator. A ratio beyond the float's range is masked like any large ratio. All tensors [T].

    ValueError: shapes differ; a negative clip.
    """
    require_same_shape(logprobs=logprobs_T, engine_logprobs=engine_logprobs_T, advantages=advantages_T)
    low, high = clip_window(clip_low, clip_high)
    ratio_T = (logprobs_T - engine_logprobs_T).detach().exp()
    inside_T = (ratio_T > low) & (ratio_T < high)
    # NaN does not count as outside, so that `require_finite` finds it.
    outside_T = ~inside_T & ~ratio_T.isnan()
    weight_T = torch.where(outside_T, 0.0, ratio_T)
    return TokenLoss(-weight_T * advantages_T * logprobs_T, ratio_T, outside_T)


register(
    PolicyLoss(
        name="dis",
        function=dis,
        reads=("engine_logprobs", "advantages"),
        ratio="x = pi_theta / mu",
        formula="-sg[f(x) A] log pi_theta, f(x) = x inside, 0 on or outside the bounds",
        source="SAO, arXiv 2607.07508",
        windows=(Window("0.8", "3", "0.2 to 4, coding"), Window("0.3", "5", "0.7 to 6, math")),
    )
)
