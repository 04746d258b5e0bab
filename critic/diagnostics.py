"""Diagnostics of the critic's values on the action tokens of a step, before the update that trains on them.

Values v_i and returns ret_i are in units of reward; i runs over action tokens. Tables (`Bin` rows) show where a critic
is wrong: early or late in an episode, in which turn, and at which of its own values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from buffer.types import Float32, Int32, SubTrace, Targets

CALIBRATION_BINS = 10
POSITION_BINS = 5
TURN_BINS = 8


class Bin(NamedTuple):
    """A group of action tokens."""

    start: float  # lower end of the group: relative position, turn, or value
    num_actions: int
    mean_value: float  # NaN when there are none
    mean_return: float  # NaN when there are none


def critic_metrics(sub_traces: Sequence[SubTrace], targets: Sequence[Targets]) -> dict[str, float]:
    """Return the critic's metrics of a step; finite numbers only.

        critic/explained_variance     `explained_variance`
        critic/value_mean             mean of v_i
        critic/calibration_error      `calibration_error`
        critic/value_by_position/b    mean v_i of bin b = 0..4 of `by_position`; critic/return_by_position/b: mean ret_i
        critic/value_by_turn/t        mean v_i of bin t = 0..7 of `by_turn`; critic/return_by_turn/t: mean ret_i

    Keys of empty bins are omitted; without action tokens the result is empty. ValueError: values or returns that are
    not finite.
    """
    actions = _actions(sub_traces, targets)
    if not len(actions.values):
        return {}
    found = {
        "critic/explained_variance": explained_variance(actions.values, actions.returns),
        "critic/value_mean": float(actions.values.mean(dtype=np.float64)),
        "critic/calibration_error": calibration_error(actions.values, actions.returns),
    }
    tables = {"position": _position_bins(actions, POSITION_BINS), "turn": _turn_bins(actions, TURN_BINS)}
    for name, table in tables.items():
        for number, row in enumerate(table):
            if row.num_actions:
                found[f"critic/value_by_{name}/{number}"] = row.mean_value
                found[f"critic/return_by_{name}/{number}"] = row.mean_return
    return found


def check_returns(returns: ArrayLike, value_range: Sequence[float]) -> None:
    """Refuse returns out of range. ValueError: a return outside the `value_range` = [low, high] of a bounded head.

    `returns` are those of action tokens. The bounds themselves are allowed, with a tolerance for float32 rounding (1e-6
    of the larger bound). [] means a head without bounds: every return is allowed.
    """
    ret = np.asarray(returns)
    if not len(value_range) or not ret.size:
        return
    low, high = value_range
    slack = 1e-6 * max(abs(low), abs(high))
    smallest, largest = float(ret.min()), float(ret.max())
    if smallest >= low - slack and largest <= high + slack:
        return
    worst = smallest if not smallest >= low - slack else largest
    raise ValueError(
        f"a return is {worst:g}, outside critic.value_range=[{low:g}, {high:g}]: the critic can't predict it; widen "
        "the range to all that an episode can return (including rewards of turns and a KL penalty in the reward, and "
        "sums of rewards and values with truncation=bootstrap or lambda_critic < 1), or set [] for no bounds"
    )


def explained_variance(values: ArrayLike, returns: ArrayLike) -> float:
    """Return 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant, below 0 worse.

    `values` and `returns` have the same shape, action tokens only. A constant offset does not lower the result: see
    `calibration_error`. Constant returns have no variance to explain: the result is 0.0, whatever the values are.
    ValueError: different sizes, empty arrays, or NaN.
    """
    v, ret = _checked(values, returns)
    total = ret.var()
    if total <= 1e-12 * float(np.square(ret).mean()):  # only rounding
        return 0.0
    return float(1.0 - (ret - v).var() / total)


def calibration_error(values: ArrayLike, returns: ArrayLike, num_bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error: how far the mean return of tokens whose value is near x lies from x.

        error = sum_{b=0}^{B-1} n_b / n * |mean value_b - mean return_b|        in units of reward, >= 0

    over the bins of `calibration`. It is at least |mean value - mean return|, 0 for a constant equal to the mean
    return, and does not measure how well good states are told from bad ones. ValueError: see `calibration`.
    """
    table = calibration(values, returns, num_bins)
    total = sum(row.num_actions for row in table)
    return math.fsum(row.num_actions / total * abs(row.mean_value - row.mean_return) for row in table)


def calibration(values: ArrayLike, returns: ArrayLike, num_bins: int = CALIBRATION_BINS) -> list[Bin]:
    """Return the mean value and mean return of tokens with similar values, in bins of about equal count.

    With w_0 <= ... <= w_(n-1) the values in order, the edges are w_floor(b n / B) for b = 1..B-1, and a token's bin is
    the number of edges that its value reaches. Equal values share a bin, so the order of tokens does not matter; empty
    bins are omitted. `start` is the smallest value of the bin. (With bins of equal width a single outlier would put
    nearly all tokens into one bin.)

    ValueError: different sizes, empty arrays, NaN, or num_bins < 1.
    """
    _check_bins(num_bins)
    v, ret = _checked(values, returns)
    ranks = [b * v.size // num_bins for b in range(num_bins)]
    edges = np.partition(v, ranks)[ranks]  # the first edge is the smallest value: every token reaches it
    number = np.searchsorted(edges[1:], v, side="right")
    return [row for row in _table(number, v, ret, edges) if row.num_actions]


def by_position(sub_traces: Sequence[SubTrace], targets: Sequence[Targets], num_bins: int = 10) -> list[Bin]:
    """Return the mean value and mean return by relative position of the action token in its episode.

    Action token j of an episode's n, counted through its sub-traces by `position`, falls into bin
    floor(j / n * num_bins); `start` is the bin's smallest j / n. The table shows a critic that is uninformed early in
    an episode and accurate late in it. ValueError: num_bins < 1.
    """
    _check_bins(num_bins)
    return _position_bins(_actions(sub_traces, targets), num_bins)


def by_turn(sub_traces: Sequence[SubTrace], targets: Sequence[Targets], num_bins: int = TURN_BINS) -> list[Bin]:
    """Return the mean value and mean return by turn number, from 0, of the action token in its episode.

    A turn is a maximal run of action tokens in a sub-trace, counted through the episode's sub-traces by `position`;
    a summary is also one. Two turns with no token between them (a tool returned nothing) count as one. The last bin
    holds turn num_bins - 1 and all later turns. ValueError: num_bins < 1.
    """
    _check_bins(num_bins)
    return _turn_bins(_actions(sub_traces, targets), num_bins)


class _Actions(NamedTuple):
    """The N action tokens of a step, episode after episode, in the order of each episode."""

    values: Float32  # [N]
    returns: Float32  # [N]
    turn: Int32  # [N] number of the token's turn in its episode
    num_actions: NDArray[np.int64]  # [E] of each episode


def _actions(sub_traces: Sequence[SubTrace], targets: Sequence[Targets]) -> _Actions:
    episodes: dict[str, list[tuple[SubTrace, Targets]]] = {}
    for trace, target in zip(sub_traces, targets, strict=True):
        episodes.setdefault(trace.episode_id, []).append((trace, target))
    values, returns, turns, counts = [], [], [], []
    for members in episodes.values():
        next_turn = count = 0
        for trace, target in sorted(members, key=lambda member: member[0].position):
            indices = np.flatnonzero(trace.action_mask)
            if not len(indices):
                continue
            turn = next_turn + np.concatenate([[0], np.cumsum(np.diff(indices) > 1)])
            next_turn, count = int(turn[-1]) + 1, count + len(indices)
            values.append(target.values[indices])
            returns.append(target.returns[indices])
            turns.append(turn.astype(np.int32))
        counts.append(count)
    return _Actions(
        values=np.concatenate([np.zeros(0, np.float32), *values]),
        returns=np.concatenate([np.zeros(0, np.float32), *returns]),
        turn=np.concatenate([np.zeros(0, np.int32), *turns]),
        num_actions=np.array(counts, np.int64),
    )


def _position_bins(actions: _Actions, num_bins: int) -> list[Bin]:
    def numbers() -> Iterator[NDArray[np.int64]]:
        for count in actions.num_actions.tolist():
            yield np.arange(count) * num_bins // max(count, 1)

    number = np.concatenate([np.zeros(0, np.int64), *numbers()])
    return _table(number, actions.values, actions.returns, np.arange(num_bins) / num_bins)


def _turn_bins(actions: _Actions, num_bins: int) -> list[Bin]:
    return _table(np.minimum(actions.turn, num_bins - 1), actions.values, actions.returns, np.arange(num_bins))


def _table(number: NDArray[np.signedinteger], values: ArrayLike, returns: ArrayLike, starts: NDArray) -> list[Bin]:
    """Return the rows of bins 0..len(starts) - 1; `number` is the bin of each token."""
    counts = np.bincount(number, minlength=len(starts))
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        means = [np.bincount(number, weights=of, minlength=len(starts)) / counts for of in (values, returns)]
    rows = zip(starts.tolist(), counts.tolist(), means[0].tolist(), means[1].tolist(), strict=True)
    return [Bin(float(start), count, value, ret) for start, count, value, ret in rows]


def _checked(values: ArrayLike, returns: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    v = np.asarray(values, np.float64).ravel()
    ret = np.asarray(returns, np.float64).ravel()
    if v.size != ret.size or not v.size:
        raise ValueError(f"{v.size} values and {ret.size} returns: their numbers must be equal and at least 1")
    for name, numbers in (("value", v), ("return", ret)):
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            raise ValueError(f"{name} {bad[0]} is {numbers[bad[0]]} ({len(bad)} of {v.size}): all must be finite")
    return v, ret


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: must be at least 1")
