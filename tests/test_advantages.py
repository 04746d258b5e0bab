"""Advantages: hand-computed numbers, a quadratic-time reference, and what must not change them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from episodes import random_episode
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from buffer.trace import cut
from buffer.types import Float32, Status, SubTrace, SubTraceKind, Successor
from critic import advantages as module
from critic.advantages import advantages, gae, whiten
from critic.config import AdvantageConfig, Credit, Truncation

Float64 = NDArray[np.float64]


def sub_trace(mask: list[int], rewards: dict[int, float] | None = None, **changes: Any) -> SubTrace:
    """A finished one-segment episode with the given action mask; `rewards` by token index."""
    num_tokens = len(mask)
    given_rewards = np.zeros(num_tokens, np.float32)
    for index, reward in (rewards or {}).items():
        given_rewards[index] = reward
    action_mask = np.array(mask, bool)
    plain = SubTrace(
        tokens=np.zeros(num_tokens, np.int32),
        action_mask=action_mask,
        logprobs=np.where(action_mask, -1, 0).astype(np.float32),
        rewards=given_rewards,
        versions=np.where(action_mask, 0, -1).astype(np.int32),
        summary_mask=np.zeros(num_tokens, bool),
        episode_id="e",
        position=0,
        successor=None,
        kind=SubTraceKind.FINAL,
        status=Status.FINISHED,
    )
    return replace(plain, **changes)


def core(
    traces: list[SubTrace], values: list[Float32], config: AdvantageConfig, bootstrap: list[float] | None = None
) -> tuple[Float64, Float64]:
    """The float64 core on all action tokens."""
    _, offsets, where = module._action_places(traces)
    steps = module._lay_out(traces, values, offsets, where, module._end_values(traces, config, bootstrap))
    return gae(steps, config)


def reference(
    traces: list[SubTrace], values: list[Float32], config: AdvantageConfig, bootstrap: list[float]
) -> tuple[list[float], list[float]]:
    """Every advantage as an explicit sum over the tokens that follow, in O(n^2) of plain Python."""
    advantage, returns = [], []
    for k, trace in enumerate(traces):
        family = {other.position: j for j, other in enumerate(traces) if other.episode_id == trace.episode_id}
        length = sum(int(traces[j].action_mask.sum()) for j in family.values())
        final = next(traces[j] for j in family.values() if traces[j].kind is SubTraceKind.FINAL)
        outcome = float(final.rewards[np.flatnonzero(final.action_mask)[-1]])
        lam = config.lambda_policy
        if config.lambda_alpha > 0:
            lam = max(0.0, 1 - 1 / (config.lambda_alpha * length))

        def path(start: int, follow: bool, k: int = k, family: dict[int, int] = family) -> list[tuple[int, int]]:
            """(sub-trace, token index) of the action tokens from action `start` of sub-trace k on."""
            steps, at, action = [], k, start
            while True:
                steps += [(at, int(index)) for index in np.flatnonzero(traces[at].action_mask)[action:]]
                successor = traces[at].successor
                if not follow or successor is None:
                    return steps
                at, action = family[successor.position], successor.action

        def deltas(steps: list[tuple[int, int]], k: int = k, outcome: float = outcome) -> list[float]:
            result = []
            for place, (at, index) in enumerate(steps):
                reward = float(traces[at].rewards[index])
                if place + 1 < len(steps):
                    after = float(values[steps[place + 1][0]][steps[place + 1][1]])
                else:
                    bootstrapped = config.truncation is Truncation.bootstrap and traces[at].status is Status.TRUNCATED
                    after = bootstrap[at] if bootstrapped and traces[at].successor is None else 0.0
                    if config.credit is not Credit.chained and traces[at].kind is not SubTraceKind.FINAL:
                        reward += outcome
                result.append(reward + config.gamma * after - float(values[at][index]))
            return result

        for action, index in enumerate(np.flatnonzero(trace.action_mask)):
            delta = deltas(path(action, follow=config.credit is Credit.chained))
            factor = 1.0
            if config.credit is Credit.discounted:
                own = int(trace.action_mask.sum()) - action
                factor = (config.gamma * lam) ** (len(path(action, follow=True)) - own)
            advantage.append(factor * sum((config.gamma * lam) ** j * d for j, d in enumerate(delta)))
            monte_carlo = sum((config.gamma * config.lambda_critic) ** j * d for j, d in enumerate(delta))
            returns.append(monte_carlo + float(values[k][index]))
    return advantage, returns


def random_values(traces: list[SubTrace], seed: int) -> list[Float32]:
    """Values for whole sub-traces; NaN where nobody may read."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=len(trace.tokens)).astype(np.float32) for trace in traces]
    return [np.where(trace.action_mask, v, np.nan).astype(np.float32) for trace, v in zip(traces, values, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    credit=st.sampled_from(Credit),
    truncation=st.sampled_from(Truncation),
    gamma=st.sampled_from([1.0, 0.97]),
    lambda_policy=st.sampled_from([0.0, 0.9, 1.0]),
    lambda_critic=st.sampled_from([0.9, 1.0]),
    lambda_alpha=st.sampled_from([0.0, 0.05, 1.5]),
)
def test_core_agrees_with_the_quadratic_reference(seed: int, **settings_: Any) -> None:
    config = AdvantageConfig(**settings_)
    traces = [trace for j in range(2) for trace in cut(random_episode(seed + j, max_depth=2 - j))]
    rng = np.random.default_rng(seed)
    traces = [traces[k] for k in rng.permutation(len(traces))]  # any order, episodes mixed
    traces = [  # rewards per turn as well
        replace(trace, rewards=(trace.rewards + trace.action_mask * (rng.random(len(trace.tokens)) < 0.1)).astype("f4"))
        for trace in traces
    ]
    values = random_values(traces, seed)
    bootstrap = rng.normal(size=len(traces)).tolist()
    expected = reference(traces, values, config, bootstrap)
    for mine, theirs in zip(core(traces, values, config, bootstrap), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)


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
    whole = sub_trace(mask.astype(int).tolist(), {39: 1.0})
    value = rng.normal(size=40).astype(np.float32)
    seam = int(np.flatnonzero(mask)[min(where, mask.sum() - 1)])
    early = mask.copy()
    early[seam:] = False
    halves = [
        replace(whole, action_mask=early, rewards=np.zeros(40, np.float32), successor=Successor(1, 0)),
        replace(whole, action_mask=mask & ~early, position=1),
    ]
    halves[0] = replace(halves[0], kind=SubTraceKind.COMPACTED)
    config = AdvantageConfig(lambda_policy=0.9, gamma=0.99, lambda_alpha=alpha)
    for one, two in zip(core([whole], [value], config), core(halves, [value, value], config), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


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


def test_length_adaptive_lambda_counts_the_episode() -> None:
    """Four actions in two segments, alpha 1/2: lambda = 1 - 1/2 = 1/2 in both; alpha * l < 1 gives 0."""
    traces = [
        sub_trace([0, 1, 1], successor=Successor(1, 0), kind=SubTraceKind.COMPACTED),
        sub_trace([0, 1, 1], {2: 1.0}, position=1),
        sub_trace([0, 1, 1], {2: 1.0}, episode_id="short"),
    ]
    zeros = [np.zeros(3, np.float32)] * 3
    targets = advantages(traces, zeros, AdvantageConfig(lambda_alpha=0.5))
    assert [target.advantages.tolist() for target in targets] == [[0, 1 / 8, 1 / 4], [0, 1 / 2, 1], [0, 0, 1]]


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
    assert whiten(np.full(3, 0.1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("field", ["value", "log-probability", "reward"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(field: str, bad: float) -> None:
    traces = [sub_trace([0, 1, 1], episode_id="good"), sub_trace([0, 1, 0, 1], episode_id="bad")]
    values = [np.zeros(3, np.float32), np.zeros(4, np.float32)]
    broken = np.array([0, 0, bad, bad], np.float32)
    if field == "value":
        values[1] = broken
    elif field == "log-probability":
        traces[1] = replace(traces[1], logprobs=broken)
    else:
        traces[1] = replace(traces[1], rewards=broken)
    with pytest.raises(ValueError, match=f"episode bad, sub-trace 0: {field} at index 3 is {bad}"):
        advantages(traces, values, AdvantageConfig())


def test_episodes_must_be_whole() -> None:
    first = sub_trace([0, 1], successor=Successor(1, 0), kind=SubTraceKind.COMPACTED)
    back = sub_trace([0, 1], position=1, successor=Successor(0, 0))
    zeros = [np.zeros(2, np.float32)] * 2
    for traces, message in [
        ([first], "successor at position 1 is missing"),
        ([first, sub_trace([0, 1], position=1, episode_id="other")], "successor at position 1 is missing"),
        ([first, first], "given twice"),
        ([first, back], "circle"),
        ([replace(first, successor=Successor(1, 1)), sub_trace([0, 1], position=1)], "no action 1"),
        ([sub_trace([0, 0])], "no action token"),
    ]:
        with pytest.raises(ValueError, match=message):
            advantages(traces, zeros[: len(traces)], AdvantageConfig())
    orphan = replace(first, successor=None)
    with pytest.raises(ValueError, match="FINAL sub-trace is missing"):
        advantages([orphan], zeros[:1], AdvantageConfig(credit=Credit.independent))
    with pytest.raises(ValueError, match="2 values for 3 tokens"):
        advantages([sub_trace([0, 1, 1])], zeros[:1], AdvantageConfig())


def test_nothing_gives_nothing_and_types_hold() -> None:
    assert advantages([], [], AdvantageConfig()) == []
    (target,) = advantages([sub_trace([0, 1, 1])], [np.zeros(3, np.float32)], AdvantageConfig())
    assert {target.advantages.dtype, target.returns.dtype, target.values.dtype} == {np.dtype(np.float32)}
