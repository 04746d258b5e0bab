"""Weights that correct for differences between the engine's and the trainer's probabilities, computed on the driver.

NumPy over whole episodes: `mis` decides by all tokens of an episode, and no worker has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from buffer.types import Float32, SubTrace
from trainer.config import Correction

VETO = 1e-4  # `mis` rejects an episode that has a token with a smaller rho

Float64 = NDArray[np.float64]


def correction_weights(
    sub_traces: Sequence[SubTrace], old_logprobs: Sequence[Float32], kind: Correction, low: float, high: float
) -> list[Float32]:
    """Return the weight c of each token's policy loss, float32 [T] for each sub-trace, in their order: l becomes c l.

    rho = pi_old / mu at each action token; pi_old: the trainer's policy before the step, `old_logprobs[k]` float32 [T];
    mu: the engine's policy, `SubTrace.logprobs`. Both are read only where action_mask is True.

        none     1
        tis      min(rho, high); low is not read
        icepop   rho where low <= rho <= high, else 0
        mis      1 for all tokens of the episode, or 0 for all of them

    tis: truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"), high = 2. icepop: Ling team 2025; INTELLECT-3, arXiv 2512.16144, eq. 1; 1/2 and 2 in GLM-5. mis:
    geometric rejection with token veto (Liu, Li et al. 2025, "When Speed Kills Stability", part 3, Geo-RS; veto 1e-4).

    `mis` keeps an episode when low <= exp(mean of log rho over all its action tokens) <= high and no token has
    rho < VETO. Kept tokens have weight 1, not rho: the source rejects and does not reweight. The criterion is a mean
    over the episode, not a product and not per sub-trace, so neither length nor the position of a cut matters.

    The weight is 0 outside action_mask. Tokens of weight 0 count in the loss's denominator (in the source of `mis` they
    do not). No kind depends on how an episode is cut; `mis` needs all sub-traces of an episode.

    ValueError: numbers of log-probabilities and tokens differ; a log-probability that is NaN or infinite, or a weight
    beyond float32 (high=inf): the message names episode, sub-trace and index; not 0 <= low < high.
    """
    if len(sub_traces) != len(old_logprobs):
        raise ValueError(
            f"{len(sub_traces)} sub-traces, {len(old_logprobs)} arrays of log-probabilities: must be equal"
        )
    log_rhos = [_log_rho(trace, old) for trace, old in zip(sub_traces, old_logprobs, strict=True)]
    if kind is not Correction.none and not (high > 0 if kind is Correction.tis else 0 <= low < high):
        raise ValueError(f"correction={kind.value} with bounds low={low}, high={high}: must be 0 <= low < high")
    if kind is Correction.mis:
        kept = _kept_episodes(sub_traces, log_rhos, low, high)
        columns = [
            np.full(len(ratios), trace.episode_id in kept, np.float32)
            for trace, ratios in zip(sub_traces, log_rhos, strict=True)
        ]
    else:
        columns = [_weights(ratios, kind, low, high) for ratios in log_rhos]
    found = []
    for trace, column in zip(sub_traces, columns, strict=True):
        weights = np.zeros(len(trace.tokens), np.float32)
        weights[trace.action_mask] = column
        _require_finite(weights, trace, f"a correction={kind.value} weight beyond float32: bound it with high < inf")
        found.append(weights)
    return found


def _log_rho(trace: SubTrace, old: Float32) -> Float64:
    """Return log rho at each action token, in order. ValueError: lengths differ, or a number is not finite."""
    if len(old) != len(trace.tokens):
        raise ValueError(f"{trace.name}: {len(old)} log-probabilities for {len(trace.tokens)} tokens: must be equal")
    for numbers, whose in ((old, "the trainer's"), (trace.logprobs, "the engine's")):
        _require_finite(np.where(trace.action_mask, numbers, 0), trace, f"{whose} log-probability must be finite")
    return old[trace.action_mask].astype(np.float64) - trace.logprobs[trace.action_mask].astype(np.float64)


def _weights(log_rho: Float64, kind: Correction, low: float, high: float) -> Float32:
    """Return the weights of `none`, `tis` or `icepop`, which treat each token by itself."""
    if kind is Correction.none:
        return np.ones(len(log_rho), np.float32)
    with np.errstate(over="ignore"):
        rho = np.exp(log_rho)
        if kind is Correction.tis:
            return np.minimum(rho, high).astype(np.float32)
        return np.where((low <= rho) & (rho <= high), rho, 0.0).astype(np.float32)


def _kept_episodes(sub_traces: Sequence[SubTrace], log_rhos: Sequence[Float64], low: float, high: float) -> set[str]:
    """Return the ids of the episodes that `mis` keeps."""
    of_episode: dict[str, list[Float64]] = {}
    for trace, log_rho in zip(sub_traces, log_rhos, strict=True):
        of_episode.setdefault(trace.episode_id, []).append(log_rho)
    kept = set()
    for episode, ratios in of_episode.items():
        every = np.concatenate(ratios)
        if not len(every):
            continue
        # An exact sum: at a bound, the order of sub-traces and the positions of cuts must not matter.
        with np.errstate(over="ignore"):
            mean, smallest = np.exp([math.fsum(every.tolist()) / len(every), every.min()])
        if low <= mean <= high and smallest >= VETO:
            kept.add(episode)
    return kept


def _require_finite(numbers: NDArray[np.floating], trace: SubTrace, what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise ValueError(f"{trace.name}, index {bad[0]} is {numbers[bad[0]]}: {what}")
