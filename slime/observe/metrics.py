"""What a step's arrays say about it: pure functions from arrays to `dict[str, float]`.

    rollout_metrics      what was played             rollout/...
    staleness_metrics    how old the tokens are      weights/lag...
    engine_metrics       engine against trainer      policy/engine_..., policy/rho_...
    correction_metrics   what makes up for it        policy/correction_...
    reference_metrics    how far from the start      policy/reference_kl
    advantage_metrics    what the policy is told     advantage/...

docs/metrics.md says what each is and what to do when it looks bad. i runs over the action tokens (action_mask
True) of a step, I of them; prompts, tool output and copied context are in no metric. What has no finite value is
left out: a key that is there is a finite number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from buffer.types import Batch, Float32, SubTrace, Targets

LAG_BINS = 8  # lags 0 .. LAG_BINS - 1 have a share each; older tokens share one

Float64 = NDArray[np.float64]


def rollout_metrics(batch: Batch) -> dict[str, float]:
    """Return numbers of a batch's episodes: means over those with a turn, sums where the name says tokens_generated or
    num_.

    An episode in which nothing was sampled is told by num_without_turn and counts in no mean; without any other there
    are no means.

    reward_std is the standard deviation over episodes (divided by their number): for rewards of 0 and 1 it is
    sqrt(p (1 - p)) exactly, p the mean. p95 is the 95th percentile, interpolated linearly. Seconds are those of an
    episode from its sandbox to its reward; straggler_ratio is the longest over the mean. tokens_per_s is that of the
    batch (buffer/throughput.py). ValueError: no episode.
    """
    if not batch.episodes:
        raise ValueError(f"step {batch.step}: the batch has no episode: at least 1 is needed")

    played = [stats for stats in batch.episodes if stats.num_sampled]
    counts = {
        "rollout/num_episodes": len(batch.episodes),
        "rollout/num_without_turn": len(batch.episodes) - len(played),
        "rollout/num_sub_traces": len(batch.items),
        "rollout/tokens_trained": batch.num_tokens,
    }
    if not played:
        return _finite(counts)

    def column(numbers: Iterable[float]) -> Float64:
        return np.array(list(numbers), np.float64)

    seconds = column(stats.duration_s for stats in played)
    tokens = column(stats.num_sampled for stats in played)
    reward = column(stats.reward for stats in played)
    found = {
        **counts,
        "rollout/reward_mean": reward.mean(),
        "rollout/reward_std": reward.std(),
        "rollout/compactions_per_episode": column(stats.num_compactions for stats in played).mean(),
        "rollout/compacted_fraction": column(stats.compacted for stats in played).mean(),
        "rollout/turns_per_episode": column(stats.num_turns for stats in played).mean(),
        "rollout/truncated_fraction": column(stats.truncated for stats in played).mean(),
        "rollout/tokens_generated": tokens.sum(),
        "rollout/tokens_p95": np.percentile(tokens, 95),
        "rollout/seconds_mean": seconds.mean(),
        "rollout/seconds_p95": np.percentile(seconds, 95),
        "rollout/seconds_max": seconds.max(),
    }
    if batch.tokens_per_s is not None:
        found["rollout/tokens_per_s"] = batch.tokens_per_s
    if seconds.mean() > 0:
        found["rollout/engine_time_fraction"] = column(stats.engine_s for stats in played).mean() / seconds.mean()
        found["rollout/straggler_ratio"] = seconds.max() / seconds.mean()
    return _finite(found)


def staleness_metrics(sub_traces: Sequence[SubTrace], version: int) -> dict[str, float]:
    """Return the weight versions between a token's sampling and its training: lag_i = version - versions_i.

    `version`: that of the weights which the step starts from. lag_share_k is the share of action tokens with lag k,
    0 <= k < 8, lag_share_8_up that of older ones; all nine are always there and sum to 1. stale_fraction is that of
    action tokens that were sampled over other weights' keys and values (stale_mask True). ValueError: a token that was
    sampled by weights newer than `version`, or no action token.
    """
    lags = version - _flat(sub_traces, [trace.versions for trace in sub_traces]).astype(np.int64)
    if lags.min() < 0:
        raise ValueError(
            f"a token was sampled by weight version {version - lags.min()}, the trainer has {version}: "
            "the engines are ahead of it; give the version that the trainer holds"
        )
    counts = np.bincount(np.minimum(lags, LAG_BINS), minlength=LAG_BINS + 1)
    shares = {f"weights/lag_share_{k}": counts[k] / len(lags) for k in range(LAG_BINS)}
    shares[f"weights/lag_share_{LAG_BINS}_up"] = counts[LAG_BINS] / len(lags)
    stale = _flat(sub_traces, [trace.stale_mask for trace in sub_traces])
    found = {"weights/lag_max": lags.max(), "weights/lag_mean": lags.mean(), "weights/stale_fraction": stale.mean()}
    return _finite({**found, **shares})


def engine_metrics(
    sub_traces: Sequence[SubTrace], old_logprobs: Mapping[int, Float32], version: int
) -> dict[str, float]:
    """Return how far the engine's probabilities mu lie from the trainer's pi_old before the step.

    With l_i = log pi_old(i) - log mu(i), rho_i = exp(l_i), over all action tokens i:

        engine_kl        mean of exp(l_i) - 1 - l_i: the k3 estimator of KL(mu || pi_old) on samples of mu
                         (Schulman 2020, "Approximating KL Divergence"); holds staleness and arithmetic
        rho_min, rho_max smallest and largest rho_i

    and over those i that were sampled at `version` and are not stale (stale_mask), where only arithmetic is left:

        engine_logprob_diff_max, _mean   of |l_i|; without such tokens max is 0 and mean is left out

    `old_logprobs[k]` is float32 [T] of sub-trace k, read where action_mask is True. ValueError: a log-probability
    that is not finite, or no action token.
    """
    engine = _finite_logprobs(sub_traces, [trace.logprobs for trace in sub_traces], "the engine")
    trainer = _finite_logprobs(sub_traces, [old_logprobs[k] for k in range(len(sub_traces))], "the trainer")
    log_rho = trainer - engine
    same = [(trace.versions == version) & ~trace.stale_mask for trace in sub_traces]
    current = np.abs(log_rho[_flat(sub_traces, same)])
    with np.errstate(over="ignore"):  # an infinite ratio is left out
        found = {
            "policy/engine_kl": (np.expm1(log_rho) - log_rho).mean(),
            "policy/rho_min": np.exp(log_rho.min()),
            "policy/rho_max": np.exp(log_rho.max()),
            "policy/engine_logprob_diff_max": current.max(initial=0.0),
        }
    if len(current):
        found["policy/engine_logprob_diff_mean"] = current.mean()
    return _finite(found)


def correction_metrics(sub_traces: Sequence[SubTrace], weights: Sequence[Float32]) -> dict[str, float]:
    """Return the weights c_i that policy losses are multiplied with (trainer/losses/correction.py), over action tokens.

    correction_mean is the mean of c_i, correction_masked the share with c_i = 0. `weights[k]`: float32 [T].
    ValueError: no action token.
    """
    flat = _flat(sub_traces, weights).astype(np.float64)
    return _finite({"policy/correction_mean": flat.mean(), "policy/correction_masked": (flat == 0).mean()})


def reference_metrics(
    sub_traces: Sequence[SubTrace], old_logprobs: Mapping[int, Float32], reference_logprobs: Mapping[int, Float32]
) -> dict[str, float]:
    """Return how far the policy has moved from the reference model before the step; {} without one.

    reference_kl is the mean of exp(-d_i) - 1 + d_i, d_i = log pi_old(i) - log pi_ref(i): the k3 estimator of
    KL(pi_old || pi_ref) (Schulman 2020). Both: float32 [T] of each sub-trace by its index. ValueError: a
    log-probability that is not finite, or no action token.
    """
    if not reference_logprobs:
        return {}
    old = _finite_logprobs(sub_traces, [old_logprobs[k] for k in range(len(sub_traces))], "the trainer")
    reference = _finite_logprobs(sub_traces, [reference_logprobs[k] for k in range(len(sub_traces))], "the reference")
    moved = old - reference
    with np.errstate(over="ignore"):
        return _finite({"policy/reference_kl": (np.expm1(-moved) + moved).mean()})


def advantage_metrics(sub_traces: Sequence[SubTrace], targets: Sequence[Targets]) -> dict[str, float]:
    """Return mean, standard deviation (divided by I) and largest size of the advantages of action tokens.

    ValueError: no action token.
    """
    flat = _flat(sub_traces, [target.advantages for target in targets]).astype(np.float64)
    return _finite(
        {"advantage/mean": flat.mean(), "advantage/std": flat.std(), "advantage/abs_max": np.abs(flat).max()}
    )


def _flat(sub_traces: Sequence[SubTrace], arrays: Sequence[NDArray]) -> NDArray:
    """Return the entries of action tokens, [I], in the order of the sub-traces. ValueError: wrong lengths, or none."""
    parts = []
    for trace, array in zip(sub_traces, arrays, strict=True):
        if len(array) != len(trace.action_mask):
            raise ValueError(f"{trace.name}: {len(array)} numbers for {len(trace.action_mask)} tokens: must be equal")
        parts.append(array[trace.action_mask])
    if not sum(map(len, parts)):
        raise ValueError(f"{len(sub_traces)} sub-traces hold no action token: at least 1 is needed")
    return np.concatenate(parts)


def _finite_logprobs(sub_traces: Sequence[SubTrace], arrays: Sequence[Float32], whose: str) -> Float64:
    flat = _flat(sub_traces, arrays).astype(np.float64)
    if not np.isfinite(flat).all():
        ends = np.cumsum([trace.num_actions for trace in sub_traces])
        bad = int(np.flatnonzero(~np.isfinite(flat))[0])
        trace = sub_traces[int(np.searchsorted(ends, bad, side="right"))]
        raise ValueError(f"{trace.name}: a log-probability of {whose} is {flat[bad]}: must be finite")
    return flat


def _finite(found: Mapping[str, float | np.floating | np.integer]) -> dict[str, float]:
    return {name: float(number) for name, number in found.items() if math.isfinite(number)}
