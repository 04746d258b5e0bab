"""Kullback-Leibler divergence to a reference policy, from sampled tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from buffer.types import Float32
from trainer.config import KL
from trainer.losses.token import require_same_shape


def kl(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor, estimator: KL) -> torch.Tensor:
    """Return a per-token estimate of KL(pi_theta || pi_ref), differentiable, [T].

    Source: Schulman 2020, "Approximating KL Divergence". With d = log pi_theta - log pi_ref at the sampled token and
    expectations over tokens sampled from pi_theta:

        estimator             value                  gradient as a loss
        k1 = d                E = KL(theta || ref)   E = 0: pure noise. Useless as a loss
        k2 = d^2 / 2          biased, O(d^3)         E[d grad log pi] = grad KL(theta || ref): the correct gradient
        k3 = e^-d - 1 + d     E = KL(theta || ref)   E[(1 - e^-d) grad log pi] = grad KL(ref || theta): the *other* KL,
                                                     equal to first order in d; its noise grows as e^-d

    As a reward (`kl_reward`) the gradient is E[k grad log pi]: k1 gives grad KL(theta || ref) exactly; k3 gives
    grad KL(theta || ref) - grad KL(ref || theta), which vanishes to first order: too weak near the reference; k2 gives
    E[d^2/2 grad log pi], which is also weak there. So use k2 (or k3, for small d) in the loss and k1 in the reward;
    report k3, which is unbiased, never negative and less noisy than k1.

    In the loss a token is charged for the divergence of its own distribution at the visited states; in the reward it is
    also charged for the states that it leads to. All this holds on-policy: off-policy the expectations are over other
    tokens.

    k3 beyond the float's range (d < -88 in float32) is infinite: see `require_finite`. ValueError: shapes differ.
    """
    require_same_shape(logprobs=logprobs_T, reference_logprobs=reference_logprobs_T)
    return _estimate(logprobs_T - reference_logprobs_T, torch.expm1, estimator)


def kl_reward(old_logprobs: Float32, reference_logprobs: Float32, estimator: KL) -> Float32:
    """Return the same estimates for the driver, which subtracts them from rewards: float32 [T], computed in float64.

    Here tokens were sampled from pi_old. `kl` explains which estimator suits a reward. k3 beyond float32 is inf; the
    advantages refuse such a reward and name the token.

    ValueError: lengths differ; a log-probability that is not finite (the message names its index).
    """
    if old_logprobs.shape != reference_logprobs.shape:
        raise ValueError(
            f"old_logprobs {old_logprobs.shape}, reference_logprobs {reference_logprobs.shape}: must be equal"
        )
    log_ratio = old_logprobs.astype(np.float64) - reference_logprobs.astype(np.float64)
    if not np.isfinite(log_ratio).all():
        at = int(np.flatnonzero(~np.isfinite(log_ratio))[0])
        raise ValueError(
            f"index {at}: old log-probability {old_logprobs[at]}, reference {reference_logprobs[at]}: must be finite"
        )
    with np.errstate(over="ignore"):
        return np.asarray(_estimate(log_ratio, np.expm1, estimator)).astype(np.float32)


def _estimate(log_ratio: Any, expm1: Callable[[Any], Any], estimator: KL) -> Any:
    if estimator is KL.k1:
        return log_ratio
    if estimator is KL.k2:
        return 0.5 * log_ratio * log_ratio
    return expm1(-log_ratio) + log_ratio
