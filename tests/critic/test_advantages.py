"""Advantages: hand-computed numbers, a quadratic-time reference, and what must not change them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from advantage_reference import core, random_traces, random_values, reference, sub_trace
from episodes import random_episode
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.trace import cut
from buffer.types import Status, SubTraceKind, Successor
from critic.advantages import advantages
from critic.config import AdvantageConfig, Credit, LambdaLength, Truncation

MODES = [
    {"credit": credit, "truncation": truncation, "lambda_length": length}
    for credit, truncation, length in itertools.product(Credit, Truncation, LambdaLength)
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(choice.value for choice in mode.values()))
numbers = given(
    seed=st.integers(0, 10**9),
    gamma=st.sampled_from([1.0, 0.97, 0.0]),
    lambda_policy=st.sampled_from([0.0, 0.9, 1.0]),
    lambda_critic=st.sampled_from([0.9, 1.0]),
    lambda_alpha=st.sampled_from([0.0, 0.05, 0.4, 1.5]),
)


@every_mode
@settings(max_examples=20, deadline=None)
@numbers
def test_core_agrees_with_the_quadratic_reference(mode: dict[str, Any], seed: int, **settings_: Any) -> None:
    config = AdvantageConfig(**mode, **settings_)
    traces = random_traces(seed)
    values = random_values(traces, seed)
    bootstrap = np.random.default_rng(seed).normal(size=len(traces)).tolist()
    expected = reference(traces, values, config, bootstrap)
    for mine, theirs in zip(core(traces, values, config, bootstrap), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)


@every_mode
@settings(max_examples=8, deadline=None)
@numbers
def test_tool_tokens_anywhere_change_no_bit(mode: dict[str, Any], seed: int, **settings_: Any) -> None:
    config = AdvantageConfig(**mode, **settings_)
    traces = random_traces(seed)
    values = random_values(traces, seed)
    rng = np.random.default_rng(seed)
    bootstrap = rng.normal(size=len(traces)).tolist()
    places = [rng.integers(0, len(trace.tokens) + 1, rng.integers(0, 30)) for trace in traces]
    fillers = {"action_mask": False, "tokens": 3, "logprobs": 0, "rewards": 0, "versions": -1, "summary_mask": False}
    fillers["stale_mask"] = False
    longer = []
    for trace, place in zip(traces, places, strict=True):
        columns: dict[str, Any] = {name: np.insert(getattr(trace, name), place, x) for name, x in fillers.items()}
        longer.append(replace(trace, **columns))
    longer_values = [np.insert(value, p, np.nan) for value, p in zip(values, places, strict=True)]
    for one, two in zip(
        core(traces, values, config, bootstrap), core(longer, longer_values, config, bootstrap), strict=True
    ):
        assert np.array_equal(one, two)


@every_mode
@settings(max_examples=8, deadline=None)
@numbers
def test_order_of_sub_traces_changes_no_bit(mode: dict[str, Any], seed: int, **settings_: Any) -> None:
    config = AdvantageConfig(**mode, **settings_, whiten=bool(seed % 2))
    traces = random_traces(seed, num_episodes=3)
    values = random_values(traces, seed)
    rng = np.random.default_rng(seed)
    bootstrap = rng.normal(size=len(traces))
    order = rng.permutation(len(traces))
    one = advantages(traces, values, config, bootstrap.tolist())
    two = advantages([traces[k] for k in order], [values[k] for k in order], config, bootstrap[order].tolist())
    for place, k in enumerate(order):
        assert np.array_equal(one[k].advantages, two[place].advantages)
        assert np.array_equal(one[k].returns, two[place].returns)


@pytest.mark.parametrize("num_tool_tokens", [0, 1, 20, 500])
def test_tool_tokens_are_not_steps(num_tool_tokens: int) -> None:
    """.2 + .95 * (.95^9 * .3) = .3796 for the last action before the tool call, however long its output."""
    mask = [0] * 3 + [1] * 10 + [0] * num_tool_tokens + [1] * 10
    values = np.full(len(mask), np.nan, np.float32)
    values[3:13], values[-10:] = 0.5, 0.7
    config = AdvantageConfig(lambda_policy=0.95)
    (target,) = advantages([sub_trace(mask, {len(mask) - 1: 1.0})], [values], config)
    assert target.advantages[12] == pytest.approx(0.2 + 0.95**10 * 0.3, abs=1e-6)
    assert round(float(target.advantages[12]), 2) == 0.38
    assert target.advantages[-1] == pytest.approx(0.3)
    assert not target.advantages[~np.array(mask, bool)].any()
    assert not target.values[~np.array(mask, bool)].any()


def test_three_credit_modes_by_hand() -> None:
    """Two segments of two actions, values 0: gamma 1, lambda 1/2, R = 1 at the end of the second."""
    traces = [
        sub_trace([0, 1, 1], successor=Successor(1, 0), kind=SubTraceKind.COMPACTED),
        sub_trace([0, 1, 1], {2: 1.0}, position=1),
    ]
    zeros = [np.zeros(3, np.float32)] * 2
    expected = {
        Credit.chained: [0, 1 / 8, 1 / 4, 0, 1 / 2, 1],
        Credit.independent: [0, 1 / 2, 1, 0, 1 / 2, 1],
        Credit.discounted: [0, 1 / 8, 1 / 4, 0, 1 / 2, 1],
    }
    for credit, numbers in expected.items():
        targets = advantages(traces, zeros, AdvantageConfig(credit=credit, lambda_policy=0.5))
        assert np.concatenate([target.advantages for target in targets]).tolist() == numbers
        assert np.concatenate([target.returns for target in targets]).tolist() == [0, 1, 1, 0, 1, 1]
    halves = [np.full(3, 0.5, np.float32)] * 2  # delta is 0 but at ends: 1/2 (there is no next value)
    targets = advantages(traces, halves, AdvantageConfig(credit=Credit.discounted, lambda_policy=0.5))
    assert targets[0].advantages.tolist() == [0, 1 / 16, 1 / 8]
    targets = advantages(traces, halves, AdvantageConfig(credit=Credit.independent, lambda_policy=0.5))
    assert targets[0].advantages.tolist() == [0, 1 / 4, 1 / 2]


def test_parallel_sub_agents_lead_to_the_same_action_by_hand() -> None:
    """lambda 1/2, R = 1: the parent's action that follows both has A = 1, each sub-agent's end A = 1/2."""
    sub: dict[str, Any] = {"kind": SubTraceKind.SUB_AGENT, "successor": Successor(0, 1)}
    traces = [
        sub_trace([0, 1, 1], {2: 1.0}),
        sub_trace([0, 1], position=1, **sub),
        sub_trace([0, 1], position=2, **sub),
    ]
    zeros = [np.zeros(len(trace.tokens), np.float32) for trace in traces]
    targets = advantages(traces, zeros, AdvantageConfig(lambda_policy=0.5))
    assert [target.advantages.tolist() for target in targets] == [[0, 0.5, 1], [0, 0.5], [0, 0.5]]


def test_lambda_one_chained_is_monte_carlo() -> None:
    traces = list(cut(random_episode(7, max_depth=0)))
    values = random_values(traces, 0)
    advantage, returns = core(traces, values, AdvantageConfig(lambda_policy=1.0))
    reward = sum(float(trace.rewards.sum()) for trace in traces)
    np.testing.assert_allclose(returns, reward, atol=1e-12)
    flat = np.concatenate([v[trace.action_mask] for trace, v in zip(traces, values, strict=True)])
    np.testing.assert_allclose(advantage, reward - flat, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**9), where=st.integers(1, 29), alpha=st.sampled_from([0.0, 1.5]))
def test_cutting_an_episode_where_contexts_agree_changes_nothing(seed: int, where: int, alpha: float) -> None:
    """The second half repeats the first as context, as if the prompt had failed to match: the same advantages."""
    rng = np.random.default_rng(seed)
    mask = rng.random(40) < 0.7
    mask[0], mask[5], mask[-1] = False, True, True
    whole = sub_trace(mask.astype(int).tolist(), {39: 1.0, 5: -0.25})
    value = rng.normal(size=40).astype(np.float32)
    seam = int(np.flatnonzero(mask)[min(where, mask.sum() - 1)])
    early = mask.copy()
    early[seam:] = False
    halves = [
        replace(whole, action_mask=early, rewards=whole.rewards * early, successor=Successor(1, 0)),
        replace(whole, action_mask=mask & ~early, rewards=whole.rewards * ~early, position=1),
    ]
    halves[0] = replace(halves[0], kind=SubTraceKind.COMPACTED)
    config = AdvantageConfig(lambda_policy=0.9, gamma=0.99, lambda_alpha=alpha)
    for one, two in zip(core([whole], [value], config), core(halves, [value, value], config), strict=True):
        assert np.array_equal(one, two)


def test_truncation_bootstraps_only_truncated_ends() -> None:
    trace = sub_trace([0, 1, 1], status=Status.TRUNCATED)
    value = np.array([np.nan, 0.25, 0.5], np.float32)
    boot = AdvantageConfig(truncation=Truncation.bootstrap, lambda_policy=0.5, gamma=0.5)
    (target,) = advantages([trace], [value], boot, bootstrap_values=[2.0])
    assert target.advantages.tolist() == [0, 0.125, 0.5]  # .5*2-.5 = .5; .5*.5-.25 + .25*.5 = .125
    (terminal,) = advantages([trace], [value], replace(boot, truncation=Truncation.terminal), [2.0])
    assert terminal.advantages[2] == -0.5
    finished = replace(trace, status=Status.FINISHED)
    (same,) = advantages([finished], [value], boot)
    assert same.advantages[2] == -0.5
    with pytest.raises(ValueError, match="episode e, sub-trace 0 is truncated"):
        advantages([trace], [value], boot)
    with pytest.raises(ValueError, match="bootstrap value is nan"):
        advantages([trace], [value], boot, [float("nan")])


def test_bootstrap_in_each_credit_mode_by_hand() -> None:
    """A compaction, then a cut-off: only the last sub-trace has a state after it, worth 2; gamma 1, lambda 1/2."""
    traces = [
        sub_trace([0, 1], successor=Successor(1, 0), kind=SubTraceKind.COMPACTED, status=Status.TRUNCATED),
        sub_trace([0, 1], {1: 0.5}, position=1, status=Status.TRUNCATED),
    ]
    ones = [np.ones(2, np.float32)] * 2
    expected = {  # last: .5 + 2 - 1; before it, chained: 1 - 1 + 1.5 / 2, else .5 - 1 (R is .5), then times 1 / 2
        Credit.chained: [0.75, 1.5],
        Credit.independent: [-0.5, 1.5],
        Credit.discounted: [-0.25, 1.5],
    }
    for credit, wanted in expected.items():
        config = AdvantageConfig(credit=credit, lambda_policy=0.5, truncation=Truncation.bootstrap)
        targets = advantages(traces, ones, config, bootstrap_values=[float("nan"), 2.0])
        assert [float(target.advantages[1]) for target in targets] == wanted


def test_rewards_per_turn_by_hand() -> None:
    """Rewards 1, 0 | 2, 4 on four actions, values 0, gamma 1/2, lambda 1/2: A_i = r_i + A_next / 4."""
    traces = [
        sub_trace([0, 1, 0, 1], {1: 1.0}, successor=Successor(1, 0), kind=SubTraceKind.COMPACTED),
        sub_trace([0, 1, 0, 1], {1: 2.0, 3: 4.0}, position=1),
    ]
    zeros = [np.zeros(4, np.float32)] * 2
    expected = {  # the terminal reward is 4, on the last action alone
        Credit.chained: ([1 + 3 / 16, 3 / 4, 3, 4], [1 + 4 / 4, 2, 4, 4]),
        Credit.independent: ([2, 4, 3, 4], [3, 4, 4, 4]),
        Credit.discounted: ([2 / 16, 4 / 16, 3, 4], [3, 4, 4, 4]),
    }
    for credit, (wanted, returns) in expected.items():
        config = AdvantageConfig(credit=credit, gamma=0.5, lambda_policy=0.5)
        found = core(traces, zeros, config)
        assert found[0].tolist() == wanted
        assert found[1].tolist() == returns


def test_length_adaptive_lambda_counts_the_episode() -> None:
    """Four actions in two segments, alpha 1/2: lambda = 1 - 1/2 = 1/2 in both; alpha * l <= 1 gives lambda 0."""
    traces = [
        sub_trace([0, 1, 1], successor=Successor(1, 0), kind=SubTraceKind.COMPACTED),
        sub_trace([0, 1, 1], {2: 1.0}, position=1),
        sub_trace([0, 1, 1], {2: 1.0}, episode_id="short"),
        sub_trace([0, 1], {1: 1.0}, episode_id="shortest"),
    ]
    zeros = [np.zeros(len(trace.tokens), np.float32) for trace in traces]
    targets = advantages(traces, zeros, AdvantageConfig(lambda_alpha=0.5))
    wanted = [[0, 1 / 8, 1 / 4], [0, 1 / 2, 1], [0, 0, 1], [0, 1]]
    assert [target.advantages.tolist() for target in targets] == wanted
    one_step = advantages(traces, zeros, AdvantageConfig(lambda_policy=0.0))
    for alpha in (1e-320, 0.01, 0.25):  # alpha * l from far below 1 to exactly 1
        tiny = advantages(traces, zeros, AdvantageConfig(lambda_alpha=alpha))
        assert all(np.array_equal(a.advantages, b.advantages) for a, b in zip(tiny, one_step, strict=True))


@pytest.mark.parametrize("credit", [Credit.chained, Credit.discounted])
def test_length_adaptive_lambda_of_each_sub_trace_by_hand(credit: Credit) -> None:
    """Two and four actions, alpha 1: lambda 1/2 and 3/4. The step that crosses decays by 1/2, its own.

    Values 0 and R = 1 at the end: chained 27/64 / 2; discounted 1 times D = 1/2 * (3/4)^3, three steps to the end.
    """
    traces = [
        sub_trace([0, 1, 1], successor=Successor(1, 0), kind=SubTraceKind.COMPACTED),
        sub_trace([0, 1, 1, 1, 1], {4: 1.0}, position=1),
    ]
    zeros = [np.zeros(len(trace.tokens), np.float32) for trace in traces]
    config = AdvantageConfig(credit=credit, lambda_alpha=1.0, lambda_length=LambdaLength.sub_trace)
    advantage, _ = core(traces, zeros, config)
    assert advantage.tolist() == [27 / 256, 27 / 128, 27 / 64, 9 / 16, 3 / 4, 1]


@settings(max_examples=20, deadline=None)
@numbers
def test_discounted_is_chained_where_only_the_end_is_known(seed: int, **settings_: Any) -> None:
    """Values 0 and a terminal reward only: R's weight is the product of the decays on the way, in both modes."""
    traces = [replace(trace, status=Status.FINISHED) for trace in cut(random_episode(seed, max_depth=0))]
    zeros = [np.zeros(len(trace.tokens), np.float32) for trace in traces]
    for length in LambdaLength:
        chained = AdvantageConfig(lambda_length=length, **settings_)
        one, _ = core(traces, zeros, chained)
        two, _ = core(traces, zeros, replace(chained, credit=Credit.discounted))
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=0)


def test_whitening_is_over_all_action_tokens_and_leaves_returns() -> None:
    traces = [trace for seed in range(4) for trace in cut(random_episode(seed))]
    values = random_values(traces, 1)
    plain = advantages(traces, values, AdvantageConfig())
    white = advantages(traces, values, AdvantageConfig(whiten=True))
    flat = np.concatenate([t.advantages[s.action_mask] for s, t in zip(traces, white, strict=True)]).astype(np.float64)
    assert abs(flat.mean()) < 1e-6
    assert abs(flat.std() - 1) < 1e-6
    assert all(np.array_equal(a.returns, b.returns) for a, b in zip(plain, white, strict=True))
    assert not any(t.advantages[~s.action_mask].any() for s, t in zip(traces, white, strict=True))
