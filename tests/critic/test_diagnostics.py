"""What is said about the critic's values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from buffer.types import Status, SubTrace, SubTraceKind, Targets
from critic.diagnostics import (
    by_position,
    by_turn,
    calibration,
    calibration_error,
    check_returns,
    critic_metrics,
    explained_variance,
)


def sub_trace(mask: str, episode: str = "e", position: int = 0) -> SubTrace:
    """`mask`: x for an action token, . for any other."""
    here = np.array([letter == "x" for letter in mask], bool)
    zeros = np.zeros(len(mask), np.float32)
    return SubTrace(
        tokens=np.zeros(len(mask), np.int32),
        action_mask=here,
        logprobs=zeros,
        rewards=zeros,
        versions=np.where(here, 0, -1).astype(np.int32),
        stale_mask=np.zeros(len(mask), bool),
        summary_mask=np.zeros(len(mask), bool),
        episode_id=episode,
        position=position,
        successor=None,
        kind=SubTraceKind.COMPACTED,
        status=Status.FINISHED,
    )


def targets(trace: SubTrace, values: list[float], factor: float = 10) -> Targets:
    """Values of the action tokens in order, returns `factor` times as large; 9 stands where nothing may be read."""
    all_values = np.full(len(trace.tokens), 9, np.float32)
    all_values[trace.action_mask] = values
    return Targets(advantages=np.zeros_like(all_values), returns=all_values * np.float32(factor), values=all_values)


def test_explained_variance_by_hand() -> None:
    returns = np.array([0.0, 0.0, 1.0, 1.0])  # variance 1/4
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 3, returns) == 1.0  # an offset is no variance
    assert explained_variance(np.full(4, 0.5), returns) == 0.0
    assert explained_variance(1 - returns, returns) == -3.0  # residual -1 or 1: variance 1
    assert explained_variance([0.0, 1.0, 1.0, 1.0], returns) == pytest.approx(1 - (3 / 16) / (1 / 4))


@pytest.mark.parametrize("same", [0.0, 0.1, -3.0])
def test_explained_variance_of_constant_returns_is_0_whatever_the_values(same: float) -> None:
    returns = np.full(7, same, np.float32)
    for values in (returns, returns + 1, np.arange(7.0)):
        assert explained_variance(values, returns) == 0.0


def test_explained_variance_of_small_rewards_does_not_vanish() -> None:
    returns = np.array([0.0, 1e-8])
    assert explained_variance(np.zeros(2), returns) == 0.0
    assert explained_variance(returns / 2, returns) == pytest.approx(0.75)
    assert explained_variance([1e7, 1e7], [0.0, 1.0]) == pytest.approx(0, abs=1e-6)  # large values do not hide it


@pytest.mark.parametrize(("values", "returns"), [([], []), ([1.0], [1.0, 2.0]), ([np.nan], [1.0]), ([1.0], [np.inf])])
@pytest.mark.parametrize("say", [explained_variance, calibration_error])
def test_refused(say: object, values: list[float], returns: list[float]) -> None:
    assert callable(say)
    with pytest.raises(ValueError, match="must be"):
        say(values, returns)


def test_calibration_by_hand() -> None:
    values = [0.4, 0.1, 0.3, 0.2]
    returns = [1.0, 0.0, 0.0, 1.0]
    assert calibration(values, returns, 2) == [
        (0.1, 2, pytest.approx(0.15), 0.5),
        (0.3, 2, pytest.approx(0.35), 0.5),
    ]
    assert calibration_error(values, returns, 2) == pytest.approx(0.5 * 0.35 + 0.5 * 0.15)
    assert calibration_error(values, returns, 1) == pytest.approx(0.25)  # |mean value - mean return|
    assert calibration_error(values, returns, 4) == pytest.approx((0.1 + 0.8 + 0.3 + 0.6) / 4)
    assert calibration_error(values, returns, 100) == calibration_error(values, returns, 4)


def test_calibration_keeps_equal_values_together() -> None:
    """A constant critic is calibrated when it says the mean, in whatever order the returns come."""
    returns = np.repeat([0.0, 1.0], 50)
    assert calibration(np.full(100, 0.5), returns) == [(0.5, 100, 0.5, 0.5)]
    assert calibration_error(np.full(100, 0.5), returns) == 0.0
    values = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3], float)
    table = calibration(values, values, 5)
    # edges 0 1 3 3: the zeros reach one of them, 1 and 2 two, 3 all four
    assert table == [(0, 3, 0, 0), (1, 3, pytest.approx(4 / 3), pytest.approx(4 / 3)), (3, 4, 3, 3)]


def test_calibration_does_not_depend_on_order_and_one_outlier_does_not_hide_the_rest() -> None:
    rng = np.random.default_rng(0)
    values = np.append(rng.random(999), 1e6)
    returns = (rng.random(1000) < 0.5).astype(float)
    order = rng.permutation(1000)
    table = calibration(values, returns)
    assert [row.num_actions for row in table] == [100] * 10
    for row, again in zip(table, calibration(values[order], returns[order]), strict=True):
        assert row == pytest.approx(again)
    assert calibration_error(values[:-1], returns[:-1]) > 0.2  # says 0.05 ... 0.95 where 0.5 is right
    honest = (rng.random(999) < values[:-1]).astype(float)
    assert calibration_error(values[:-1], honest) < 0.1


def test_by_position_counts_through_the_sub_traces_of_an_episode() -> None:
    first, second = sub_trace(".x.x"), sub_trace(".x.x", position=1)
    bins = by_position([second, first], [targets(second, [3, 4]), targets(first, [1, 2])], num_bins=2)
    assert bins == [(0.0, 2, 1.5, 15.0), (0.5, 2, 3.5, 35.0)]
    sparse = by_position([first], [targets(first, [1, 2])], num_bins=3)
    assert [entry.num_actions for entry in sparse] == [1, 1, 0]
    assert np.isnan(sparse[2].mean_value)
    with pytest.raises(ValueError, match="num_bins=0"):
        by_position([first], [targets(first, [1, 2])], num_bins=0)


def test_by_turn_counts_runs_through_the_sub_traces_of_an_episode() -> None:
    first, second = sub_trace(".xx.x"), sub_trace("..xxx", position=1)
    other = sub_trace(".x", episode="f")
    given = [other, second, first]
    of = [targets(other, [7]), targets(second, [4, 5, 6]), targets(first, [1, 2, 3])]
    assert by_turn(given, of, num_bins=4) == [
        (0.0, 3, pytest.approx(10 / 3), pytest.approx(100 / 3)),  # 1, 2 and the other episode's 7
        (1.0, 1, 3.0, 30.0),
        (2.0, 3, 5.0, 50.0),  # a new sub-trace is a new turn
        (3.0, 0, pytest.approx(np.nan, nan_ok=True), pytest.approx(np.nan, nan_ok=True)),
    ]
    assert [row.num_actions for row in by_turn(given, of, num_bins=2)] == [3, 4]  # the last holds the later ones


def test_critic_metrics_are_those_of_the_tables_and_leave_out_empty_bins() -> None:
    first = sub_trace(".x.x..x")
    said = critic_metrics([first], [targets(first, [1, 2, 3])])
    assert said == pytest.approx(
        {
            "critic/explained_variance": 1 - 81 / 100,  # returns are 10 v: the residual is 9 v
            "critic/value_mean": 2,
            "critic/calibration_error": (9 + 18 + 27) / 3,
            **{f"critic/value_by_position/{b}": v for b, v in ((0, 1), (1, 2), (3, 3))},
            **{f"critic/return_by_position/{b}": 10 * v for b, v in ((0, 1), (1, 2), (3, 3))},
            **{f"critic/value_by_turn/{t}": t + 1 for t in range(3)},
            **{f"critic/return_by_turn/{t}": 10 * (t + 1) for t in range(3)},
        }
    )


def test_critic_metrics_with_many_turns_and_without_any() -> None:
    long = sub_trace(".x" * 10)
    said = critic_metrics([long], [targets(long, [float(i) for i in range(10)])])
    assert said["critic/value_by_turn/6"] == 6
    assert said["critic/value_by_turn/7"] == 8  # turns 7, 8 and 9
    assert "critic/value_by_turn/8" not in said
    assert all(np.isfinite(list(said.values())))
    assert critic_metrics([], []) == {}


def test_critic_metrics_do_not_depend_on_the_order_of_sub_traces() -> None:
    rng = np.random.default_rng(1)
    traces = [sub_trace("." + "".join(rng.choice(list("x."), 30)) + "x", f"e{k // 3}", k % 3) for k in range(12)]
    of = [targets(trace, rng.normal(size=trace.num_actions).tolist(), rng.normal()) for trace in traces]
    order = rng.permutation(12)
    again = critic_metrics([traces[k] for k in order], [of[k] for k in order])
    assert again == pytest.approx(critic_metrics(traces, of))


def test_nan_on_an_action_token_is_refused_and_elsewhere_not_read() -> None:
    first = sub_trace(".x.x")
    good = targets(first, [1, 2])
    bad = replace(good, values=np.array([np.nan, 1, np.nan, 2], np.float32))
    assert critic_metrics([first], [bad]) == critic_metrics([first], [good])
    with pytest.raises(ValueError, match=r"value 1 is nan \(1 of 2\)"):
        critic_metrics([first], [replace(good, values=np.array([0, 1, 0, np.nan], np.float32))])


@pytest.mark.parametrize("returns", [[0.0, 0.5, 1.0], [-1e-9, 1 + 1e-7], []])
def test_returns_inside_the_range_and_on_its_bounds_are_allowed(returns: list[float]) -> None:
    check_returns(np.array(returns, np.float32), [0.0, 1.0])


def test_bounds_that_float32_rounds_are_allowed() -> None:
    for low, high in [(0.1, 0.3), (-0.7, -0.1), (1 / 3, 2 / 3)]:
        check_returns(np.array([low, high], np.float32), [low, high])


@pytest.mark.parametrize(("returns", "named"), [([0.5, -0.25], "-0.25"), ([0.0, 1.5, 7.0], "7"), ([np.nan], "nan")])
def test_returns_outside_the_range_are_refused_by_number(returns: list[float], named: str) -> None:
    with pytest.raises(ValueError, match=rf"a return is {named}, outside critic.value_range=\[0, 1\].*widen"):
        check_returns(returns, [0.0, 1.0])
    check_returns(returns, [])
