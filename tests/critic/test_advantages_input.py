"""Advantages of degenerate, wrong and unusual input: a defined result, or an error with the number and the cure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from advantage_reference import random_traces, random_values, sub_trace

from buffer.types import SubTraceKind, Successor
from critic.advantages import advantages, whiten
from critic.config import AdvantageConfig, Credit, Truncation


def test_equal_advantages_are_whitened_to_zeros() -> None:
    assert whiten(np.full(3, 0.1)).tolist() == [0, 0, 0]
    assert whiten(np.array([5.0])).tolist() == [0]
    assert whiten(np.zeros(2)).tolist() == [0, 0]
    assert whiten(np.array([0.7, 0.7 + 6e-8, 0.7 - 6e-8])).tolist() == [0, 0, 0]  # float32's rounding is no signal
    assert whiten(np.array([3.0, 1.0]) * 1e-12).tolist() == pytest.approx([1, -1])  # small ones are not equal ones
    traces = [sub_trace([0, 1, 0, 1], {3: 1.0}, episode_id=name) for name in "abc"]
    values = [np.full(4, 0.3, np.float32)] * 3
    config = AdvantageConfig(lambda_policy=1.0, whiten=True)
    for target in advantages(traces, values, config):  # all rewards equal, all values equal
        assert target.advantages.tolist() == [0, 0, 0, 0]
        assert target.returns.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("field", ["value", "log-probability", "reward"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(field: str, bad: float) -> None:
    traces = [sub_trace([0, 1, 1], episode_id="good"), sub_trace([0, 1, 0, 1], episode_id="bad")]
    values = [np.zeros(3, np.float32), np.zeros(4, np.float32)]
    broken = np.array([0, 0, 0 if field == "reward" else bad, bad], np.float32)
    if field == "value":
        values[1] = broken
    elif field == "log-probability":
        traces[1] = replace(traces[1], logprobs=broken)
    else:
        traces[1] = replace(traces[1], rewards=broken)
    with pytest.raises(ValueError, match=f"episode bad, sub-trace 0: {field} at index 3 is {bad}"):
        advantages(traces, values, AdvantageConfig())


def test_what_can_not_be_computed_is_named() -> None:
    trace, zeros = sub_trace([0, 1, 0, 1]), np.zeros(4, np.float32)
    lost = np.array([0, 0, 0.5, 1], np.float32)
    huge = np.array([0, -3e38, 0, 3e38], np.float32)
    nowhere = np.array([np.nan, 0, 0, 1], np.float32)
    for broken, value, message in [
        (
            replace(trace, rewards=lost),
            zeros,
            r"sub-trace 0: reward at index 2 is 0.5, but that token is not an action",
        ),
        (replace(trace, rewards=nowhere), zeros, r"reward at index 0 is nan, but that token is not an action"),
        (sub_trace([0, 1, 0, 1], {3: 3e38}), huge, r"sub-trace 0: advantage at index 1 is beyond float32: scale"),
        (sub_trace([1, 1, 0, 1]), zeros, r"action_mask is True at index 0"),
        (sub_trace([0, 0, 0, 0]), zeros, r"has no action token: leave it out"),
        (trace, zeros[:2], r"value has shape \(2,\) for 4 tokens"),
        (trace, zeros[:, None], r"value has shape \(4, 1\) for 4 tokens"),
        (replace(trace, rewards=lost[:3]), zeros, r"reward has shape \(3,\) for 4 tokens"),
        (replace(trace, logprobs=lost[:3]), zeros, r"log-probability has shape \(3,\) for 4 tokens"),
        (replace(trace, action_mask=lost[:3] > 0), zeros, r"action_mask has shape \(3,\) for 4 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            advantages([broken], [value], AdvantageConfig())
    with pytest.raises(ValueError, match="values of 2 sub-traces for 1 sub-traces"):
        advantages([trace], [zeros, zeros], AdvantageConfig())
    with pytest.raises(ValueError, match="3 bootstrap values for 1 sub-traces"):
        advantages([trace], [zeros], AdvantageConfig(truncation=Truncation.bootstrap), [0.0] * 3)


@pytest.mark.parametrize("name", ["gamma", "lambda_policy", "lambda_critic", "lambda_alpha"])
@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_settings_out_of_range_are_refused(name: str, bad: float) -> None:
    changes: dict[str, Any] = {name: bad}
    with pytest.raises(ValueError, match=f"advantage.{name}={bad}: must be"):
        advantages([sub_trace([0, 1])], [np.zeros(2, np.float32)], AdvantageConfig(**changes))


def test_episodes_must_be_whole() -> None:
    first = sub_trace([0, 1], successor=Successor(1, 0), kind=SubTraceKind.COMPACTED)
    back = sub_trace([0, 1], position=1, successor=Successor(0, 0))
    zeros = [np.zeros(2, np.float32)] * 2
    for traces, message in [
        ([first], "successor at position 1 is missing"),
        ([first, sub_trace([0, 1], position=1, episode_id="other")], "successor at position 1 is missing"),
        ([first, first], "given twice"),
        ([first, back], "form a cycle"),
        ([replace(first, successor=Successor(1, 1)), sub_trace([0, 1], position=1)], "no action 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            advantages(traces, zeros[: len(traces)], AdvantageConfig())
    orphan = replace(first, successor=None)
    with pytest.raises(ValueError, match="FINAL sub-trace is missing"):
        advantages([orphan], zeros[:1], AdvantageConfig(credit=Credit.independent))
    two_ends = [sub_trace([0, 1]), sub_trace([0, 1], position=1)]
    with pytest.raises(ValueError, match="sub-trace 1 is the second FINAL sub-trace"):
        advantages(two_ends, zeros, AdvantageConfig(credit=Credit.discounted))


def test_nothing_gives_nothing_and_types_hold() -> None:
    assert advantages([], [], AdvantageConfig()) == []
    (target,) = advantages([sub_trace([0, 1, 1])], [np.zeros(3, np.float32)], AdvantageConfig())
    assert {target.advantages.dtype, target.returns.dtype, target.values.dtype} == {np.dtype(np.float32)}


def test_inputs_may_be_read_only_or_strided() -> None:
    """Arrays out of Ray's object store are read-only."""
    traces = random_traces(3)
    values = random_values(traces, 3)
    expected = advantages(traces, values, AdvantageConfig())
    read_only, strided = [], []
    for trace in traces:
        names = ("action_mask", "logprobs", "rewards")
        frozen: dict[str, Any] = {name: getattr(trace, name).copy() for name in names}
        for column in frozen.values():
            column.flags.writeable = False
        read_only.append(replace(trace, **frozen))
        every_second: dict[str, Any] = {name: np.repeat(column, 2)[::2] for name, column in frozen.items()}
        strided.append(replace(trace, **every_second))
    for given in (read_only, strided):
        for mine, theirs in zip(advantages(given, values, AdvantageConfig()), expected, strict=True):
            assert np.array_equal(mine.advantages, theirs.advantages)
            assert np.array_equal(mine.returns, theirs.returns)
