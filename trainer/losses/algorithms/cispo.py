"""CISPO: clipped importance-sampling weights."""

from __future__ import annotations

import torch

from trainer.losses.registry import PolicyLoss, Window, register
from trainer.losses.token import TokenLoss, clip_window, require_same_shape


def cispo(
    logprobs_T: torch.Tensor,
    engine_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """Compute CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5): the weight is clipped, no token loses its gradient.

        x = pi_theta / mu, mu the engine's probability
        l = -sg[clip(x, 1 - clip_low, 1 + clip_high) A] log pi_theta
        dl/dlog pi = -clip(x, 1 - clip_low, 1 + clip_high) A

    The paper has no lower bound: clip_low >= 1. `clipped_T` is True strictly outside the window; those tokens also have
    a gradient. A ratio beyond the float's range counts as 1 + clip_high. All tensors [T].

    ValueError: shapes differ; a negative clip.
    """
    require_same_shape(logprobs=logprobs_T, engine_logprobs=engine_logprobs_T, advantages=advantages_T)
    low, high = clip_window(clip_low, clip_high)
    ratio_T = (logprobs_T - engine_logprobs_T).detach().exp()
    weight_T = ratio_T.clamp(low, high)
    return TokenLoss(-weight_T * advantages_T * logprobs_T, ratio_T, (ratio_T < low) | (ratio_T > high))


register(
    PolicyLoss(
        name="cispo",
        function=cispo,
        reads=("engine_logprobs", "advantages"),
        ratio="x = pi_theta / mu",
        formula="-sg[clip(x, 1 - clip_low, 1 + clip_high) A] log pi_theta",
        source="MiniMax-M1, arXiv 2506.13585",
        windows=(Window("1", "3", "no lower bound; 4 above (public trainers use 4 to 6)"),),
    )
)
