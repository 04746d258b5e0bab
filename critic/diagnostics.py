"""How good the critic's values are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from buffer.types import SubTrace, Targets


def explained_variance(values: ArrayLike, returns: ArrayLike) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant, below 0 worse.

    `values` and `returns` are of one shape, action tokens only. Constant returns have no variance to
    explain: 1.0 when the values differ from them by a constant, else 0.0. ValueError: different sizes,
    nothing given, or NaN.
    """
    v = np.asarray(values, np.float64).ravel()
    ret = np.asarray(returns, np.float64).ravel()
    if v.size != ret.size or not v.size:
        raise ValueError(f"{v.size} values and {ret.size} returns: must be equally many, at least one")
    if not (np.isfinite(v).all() and np.isfinite(ret).all()):
        raise ValueError("values and returns must be finite")
    total = ret.var()
    residual = (ret - v).var()
    floor = 1e-12 * float(np.square(ret).mean() + np.square(v).mean())  # rounding is no variance
    if total <= floor:
        return 1.0 if residual <= floor else 0.0
    return float(1.0 - residual / total)


class PositionBin(NamedTuple):
    """Action tokens of one stretch of their episodes."""

    start: float  # relative position in the episode, 0 to 1
    num_actions: int
    mean_value: float  # NaN when there are none
    mean_return: float


def by_position(sub_traces: Sequence[SubTrace], targets: Sequence[Targets], num_bins: int = 10) -> list[PositionBin]:
    """Mean value and mean return by relative position of the action token in its episode.

    Action token j of an episode's n, counted through its sub-traces by `position`, falls into bin
    floor(j / n * num_bins). A critic that knows nothing early and everything late shows it here.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: must be at least 1")
    episodes: dict[str, list[tuple[SubTrace, Targets]]] = {}
    for trace, target in zip(sub_traces, targets, strict=True):
        episodes.setdefault(trace.episode_id, []).append((trace, target))
    counts, value_sums, return_sums = np.zeros(num_bins, np.int64), np.zeros(num_bins), np.zeros(num_bins)
    for parts in episodes.values():
        parts.sort(key=lambda part: part[0].position)
        v = np.concatenate([target.values[trace.action_mask] for trace, target in parts])
        ret = np.concatenate([target.returns[trace.action_mask] for trace, target in parts])
        bins = np.arange(len(v)) * num_bins // max(len(v), 1)
        counts += np.bincount(bins, minlength=num_bins)
        value_sums += np.bincount(bins, weights=v, minlength=num_bins)
        return_sums += np.bincount(bins, weights=ret, minlength=num_bins)
    return [
        PositionBin(
            start=k / num_bins,
            num_actions=int(counts[k]),
            mean_value=float(value_sums[k] / counts[k]) if counts[k] else float("nan"),
            mean_return=float(return_sums[k] / counts[k]) if counts[k] else float("nan"),
        )
        for k in range(num_bins)
    ]
