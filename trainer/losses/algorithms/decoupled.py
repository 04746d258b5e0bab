"""Decoupled proximal policy optimization."""

from __future__ import annotations

import torch

from trainer.losses.algorithms.ppo import ppo
from trainer.losses.registry import PolicyLoss, Window, register
from trainer.losses.token import TokenLoss, require_same_shape


def decoupled(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    engine_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """Compute decoupled PPO (AReaL, arXiv 2505.24298; Hilton et al., arXiv 2110.00641).

        l = sg[pi_prox / mu] * PPO(pi_theta / pi_prox)

    pi_prox = pi_old, the trainer's policy at the start of the step; mu = the policy that the engine sampled from. The
    first factor corrects for stale or different sampling weights and has no clip; the second keeps the step near
    pi_prox. With mu = pi_prox it equals `ppo`. `ratio_T` is pi_theta / pi_prox. All tensors [T].

    A first factor beyond the float's range gives an infinite loss (NaN if A = 0): see `require_finite`.
    ValueError: shapes differ; a negative clip.
    """
    require_same_shape(engine_logprobs=engine_logprobs_T, logprobs=logprobs_T)
    near = ppo(logprobs_T, old_logprobs_T, advantages_T, clip_low, clip_high)
    return near._replace(loss_T=(old_logprobs_T - engine_logprobs_T).detach().exp() * near.loss_T)


register(
    PolicyLoss(
        name="decoupled",
        function=decoupled,
        reads=("old_logprobs", "engine_logprobs", "advantages"),
        ratio="r = pi_theta / pi_old",
        formula="(pi_old / mu) times ppo's",
        source="AReaL, arXiv 2505.24298",
        windows=(Window("0.2", "0.28", "ppo's"),),
    )
)
