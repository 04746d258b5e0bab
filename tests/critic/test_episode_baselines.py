"""Baselines without a critic: by hand, against plain Python, and whatever the cuts and the order."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.types import Status, SubTrace, SubTraceKind, Successor, Targets
from critic.config import Baseline
from critic.episode_baselines import (
    EPS,
    Float64,
    Int64,
    action_counts,
    episode_advantages,
    episode_returns,
    spread,
    zero_signal_fraction,
)

GROUPED = [Baseline.grpo, Baseline.grpo_no_std, Baseline.rloo]
ALL = [*GROUPED, Baseline.reinforce_pp]


def advantages(
    returns: Sequence[float], groups: Sequence[int], kind: Baseline, counts: Sequence[int] | None = None
) -> Float64:
    num_actions = None if counts is None else np.array(counts, np.int64)
    return episode_advantages(np.array(returns, np.float64), np.array(groups, np.int64), kind, num_actions)


def sub_traces_of(episode_id: str, rewards: Sequence[float], cuts: Sequence[int]) -> list[SubTrace]:
    """An episode of len(rewards) actions, cut before the actions `cuts`; each follows a token of context."""
    borders = [0, *cuts, len(rewards)]
    found = []
    for position, (begin, end) in enumerate(pairwise(borders)):
        mask = np.tile([False, True], end - begin)
        given_here = np.zeros(len(mask), np.float32)
        given_here[mask] = rewards[begin:end]
        final = end == len(rewards)
        found.append(
            SubTrace(
                tokens=np.zeros(len(mask), np.int32),
                action_mask=mask,
                logprobs=np.zeros(len(mask), np.float32),
                rewards=given_here,
                versions=np.where(mask, 0, -1).astype(np.int32),
                stale_mask=np.zeros(len(mask), np.bool_),
                summary_mask=np.zeros(len(mask), np.bool_),
                episode_id=episode_id,
                position=position,
                successor=None if final else Successor(position + 1, 0),
                kind=SubTraceKind.FINAL if final else SubTraceKind.COMPACTED,
                status=Status.FINISHED,
            )
        )
    return found


# ------------------------------------------------------------------- by hand


RETURNS, GROUPS, COUNTS = [1.0, 0.0, 1.0, 1.0, 0.0], [7, 7, 3, 3, 3], [1, 3, 2, 1, 3]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Baseline.grpo_no_std, [1 / 2, -1 / 2, 1 / 3, 1 / 3, -2 / 3]),
        (Baseline.grpo, [0.5**0.5, -(0.5**0.5), 3**-0.5, 3**-0.5, -2 * 3**-0.5]),
        (Baseline.rloo, [1, -1, 1 / 2, 1 / 2, -1]),
    ],
)
def test_uneven_groups_by_hand(kind: Baseline, wanted: list[float]) -> None:
    """1 0 | 1 1 0: sample deviations sqrt(1/2) and sqrt(1/3); the others' means 0 1 | 1/2 1/2 1."""
    assert advantages(RETURNS, GROUPS, kind) == pytest.approx(wanted, abs=3 * EPS)


def test_reinforce_pp_by_hand() -> None:
    """Returns 1 and 4 on 2 and 1 tokens: mean 2, variance (1 + 1 + 4) / 3 = 2. Over episodes it would be 2.5, 2.25."""
    found = advantages([1, 4], [0, 1], Baseline.reinforce_pp, [2, 1])
    assert found == pytest.approx([-(2**-0.5), 2**0.5], abs=3 * EPS)


def test_reinforce_pp_subtracts_the_groups_first_where_there_are_some() -> None:
    """6 2 | 9 9: centred 2 -2 0 0 on 1 1 3 3 tokens: mean 0, variance 8 / 8 = 1."""
    found = advantages([6, 2, 9, 9], [0, 0, 1, 1], Baseline.reinforce_pp, [1, 1, 3, 3])
    assert found == pytest.approx([2, -2, 0, 0], abs=3 * EPS)
    found = advantages([6, 2, 9, 9], [0, 0, 1, 1], Baseline.reinforce_pp, [3, 1, 2, 2])  # mean 1/2, variance 7/4
    assert found == pytest.approx([1.5 / 1.75**0.5, -2.5 / 1.75**0.5, *[-0.5 / 1.75**0.5] * 2], abs=3 * EPS)


# ----------------------------------------------------- against a plain re-derivation


def plain(returns: Sequence[float], groups: Sequence[int], kind: Baseline, counts: Sequence[int]) -> list[float]:
    """The equations, one number after the other."""

    def members(e: int) -> list[float]:
        return [r for r, g in zip(returns, groups, strict=True) if g == groups[e]]

    def mean(numbers: Sequence[float]) -> float:
        return sum(numbers) / len(numbers)

    found = []
    for e, own in enumerate(returns):
        group = members(e)
        if kind is Baseline.rloo:
            others = [r for j, r in enumerate(returns) if groups[j] == groups[e] and j != e]
            found.append(own - mean(others))
        elif kind is Baseline.grpo:
            found.append(float((own - mean(group)) / (np.std(group, ddof=1) + EPS)))
        else:
            found.append(own if len(group) == 1 else own - mean(group))
    if kind is not Baseline.reinforce_pp:
        return found
    tokens = [c for c, count in zip(found, counts, strict=True) for _ in range(count)]
    return [float((c - mean(tokens)) / (np.std(tokens) + EPS)) for c in found]


@st.composite
def steps(draw: st.DrawFn, smallest: int = 2, largest: int = 5) -> tuple[list[float], list[int], list[int]]:
    """Returns, groups (in any order, uneven) and action tokens of a step's episodes."""
    sizes = draw(st.lists(st.integers(smallest, largest), min_size=1, max_size=5))
    groups = draw(st.permutations([7 * number for number, size in enumerate(sizes) for _ in range(size)]))
    reward = st.sampled_from([0.0, 0.0, 1.0, 1.0, -2.5, 0.1, 3.0])
    returns = draw(st.lists(reward, min_size=len(groups), max_size=len(groups)))
    counts = draw(st.lists(st.integers(1, 9), min_size=len(groups), max_size=len(groups)))
    return returns, list(groups), counts


@settings(max_examples=100, deadline=None)
@given(steps(), st.sampled_from(ALL))
def test_equations_hold_for_any_groups(step: tuple[list[float], list[int], list[int]], kind: Baseline) -> None:
    returns, groups, counts = step
    found = advantages(returns, groups, kind, counts)
    assert found == pytest.approx(plain(returns, groups, kind, counts), abs=1e-8)


@settings(max_examples=50, deadline=None)
@given(steps(smallest=1, largest=1))
def test_reinforce_pp_without_groups(step: tuple[list[float], list[int], list[int]]) -> None:
    returns, groups, counts = step
    found = advantages(returns, groups, Baseline.reinforce_pp, counts)
    assert found == pytest.approx(plain(returns, groups, Baseline.reinforce_pp, counts), abs=1e-8)


# ------------------------------------------------------------------ identities


@settings(max_examples=50, deadline=None)
@given(steps(), st.floats(0.5, 20), st.floats(-50, 50))
def test_scale_and_shift_of_the_reward(
    step: tuple[list[float], list[int], list[int]], scale: float, shift: float
) -> None:
    """Normalised ones do not see an affine change (but for EPS), the others see its scale; a shift nobody."""
    returns, groups, counts = step
    moved = [scale * r + shift for r in returns]
    for kind in ALL:
        before, after = advantages(returns, groups, kind, counts), advantages(moved, groups, kind, counts)
        wanted = before if kind in (Baseline.grpo, Baseline.reinforce_pp) else scale * before
        assert after == pytest.approx(wanted, rel=1e-4, abs=1e-7)


@settings(max_examples=50, deadline=None)
@given(steps(), st.integers(0, 10**6))
def test_sums_and_the_order_of_episodes(step: tuple[list[float], list[int], list[int]], seed: int) -> None:
    returns, groups, counts = step
    order = random.Random(seed).sample(range(len(returns)), len(returns))
    size = np.array([groups.count(g) for g in groups])
    for kind in ALL:
        found = advantages(returns, groups, kind, counts)
        shuffled = [returns[k] for k in order], [groups[k] for k in order], kind, [counts[k] for k in order]
        assert advantages(*shuffled) == pytest.approx(found[order], abs=1e-9)
        if kind is Baseline.reinforce_pp:
            weights = np.array(counts)
            assert np.dot(found, weights) == pytest.approx(0, abs=1e-8)
            assert np.dot(found**2, weights) / weights.sum() == pytest.approx(float(found.any()), abs=1e-4)
            continue
        for group in set(groups):
            of_group = found[np.array(groups) == group]
            assert of_group.sum() == pytest.approx(0, abs=1e-8)
            if kind is Baseline.grpo and of_group.any():
                assert np.var(of_group, ddof=1) == pytest.approx(1, abs=1e-4)
    leave_one_out = advantages(returns, groups, Baseline.rloo)
    assert leave_one_out == pytest.approx(size / (size - 1) * advantages(returns, groups, Baseline.grpo_no_std))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_nothing(kind: Baseline, reward: float) -> None:
    found = advantages([reward] * 10, [0, 0, 0, 1, 1, 1, 1, 1, 1, 1], kind, [3] * 9 + [100])
    assert not found.any()
    assert not advantages([reward] * 10, range(10), Baseline.reinforce_pp, [3, 1, 7, 3, 3, 3, 11, 3, 3, 100]).any()


def test_only_groups_of_equal_rewards_have_no_signal() -> None:
    returns, groups = np.array([1, 0, 1, 1, 1, 0, 0, 0, 5.0]), np.array([0, 0, 0, 1, 1, 2, 2, 3, 3])
    assert zero_signal_fraction(returns, groups) == 0.5
    found = episode_advantages(returns, groups, Baseline.grpo)
    assert found.astype(bool).tolist() == [True] * 3 + [False] * 4 + [True] * 2
    assert zero_signal_fraction(returns, np.arange(9)) == 1
    assert zero_signal_fraction(returns, np.zeros(9, np.int64)) == 0


# ------------------------------------------------------- episodes and their sub-traces


def flat(sub_traces: Sequence[SubTrace], targets: Sequence[Targets], name: str) -> dict[str, list[float]]:
    """Episode -> a target at each of its action tokens, in time order; zero was found elsewhere."""
    found: dict[str, list[float]] = {}
    for trace, target in sorted(
        zip(sub_traces, targets, strict=True), key=lambda pair: (pair[0].episode_id, pair[0].position)
    ):
        numbers = getattr(target, name)
        assert numbers.dtype == np.float32
        assert numbers.shape == trace.tokens.shape
        assert not numbers[~trace.action_mask].any()
        found.setdefault(trace.episode_id, []).extend(numbers[trace.action_mask].tolist())
    return found


def judge(
    sub_traces: Sequence[SubTrace], ids: Sequence[str], terminal: Sequence[float], groups: Int64, kind: Baseline
) -> tuple[Float64, list[Targets]]:
    returns = episode_returns(sub_traces, ids, terminal)
    found = episode_advantages(returns, groups, kind, action_counts(sub_traces, ids))
    return returns, spread(sub_traces, ids, found, returns)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(ALL))
def test_neither_cuts_nor_order_matter(seed: int, kind: Baseline) -> None:
    """Rewards of turns and of a penalty at every token; one cut of each episode against another, shuffled."""
    rng = random.Random(seed)
    ids = [f"{number}.0" for number in range(6)]
    groups = np.array([0, 0, 1, 1, 1, 1])
    rewards = [[rng.choice([0.0, 1.0, rng.gauss(0, 1)]) for _ in range(rng.randint(1, 12))] for _ in ids]
    seen = []
    for _ in range(2):
        traces = []
        for episode_id, of_episode in zip(ids, rewards, strict=True):
            inner = range(1, len(of_episode))
            traces += sub_traces_of(episode_id, of_episode, sorted(rng.sample(inner, rng.randint(0, len(inner)))))
        rng.shuffle(traces)
        returns, targets = judge(traces, ids, [0.0] * 6, groups, kind)
        seen.append((returns.tolist(), *(flat(traces, targets, name) for name in ("advantages", "returns", "values"))))
    assert seen[0] == seen[1]
    returns_of, advantages_of, trained_returns_of, values_of = seen[0]
    wanted = plain(returns_of, groups.tolist(), kind, [len(r) for r in rewards])
    for e, episode_id in enumerate(ids):
        assert returns_of[e] == pytest.approx(sum(np.float32(r) for r in rewards[e]), abs=1e-5)
        assert advantages_of[episode_id] == pytest.approx([wanted[e]] * len(rewards[e]), abs=1e-5)
        assert trained_returns_of[episode_id] == pytest.approx([returns_of[e]] * len(rewards[e]), abs=1e-5)
        assert values_of[episode_id] == [0] * len(rewards[e])


def test_an_episode_without_sub_traces_is_compared_with_nobody() -> None:
    """It has its terminal reward, as float32; equal rewards stay equal."""
    ids = ["0.0", "1.0", "2.0"]
    traces = [*sub_traces_of("2.0", [0, 0, 0.1], [1]), *sub_traces_of("0.0", [0.1], [])]
    returns, targets = judge(traces, ids, [9.0, 0.1, 9.0], np.array([4, 4, 4]), Baseline.grpo)
    assert returns.tolist() == [float(np.float32(0.1))] * 3
    assert not any(target.advantages.any() for target in targets)
    returns, targets = judge(traces, ids, [9.0, 1.6, 9.0], np.array([4, 4, 4]), Baseline.grpo_no_std)
    assert returns == pytest.approx([0.1, 1.6, 0.1])
    assert not any(target.advantages.any() for target in targets)  # the two others earned the same
    assert action_counts(traces, ids).tolist() == [1, 0, 3]


@settings(max_examples=60, deadline=None)
@given(steps(), st.sampled_from(ALL), st.integers(0, 2**25))
def test_episodes_in_which_nothing_was_sampled_count_nowhere(
    step: tuple[list[float], list[int], list[int]], kind: Baseline, chosen: int
) -> None:
    """The others' advantages are those of the step without them; one that is left alone in its group has no signal."""
    returns, groups, counts = step
    silent = [e for e in range(len(returns)) if chosen >> e & 1]
    heard = [e for e in range(len(returns)) if e not in silent]
    found = advantages(returns, groups, kind, [0 if e in silent else c for e, c in enumerate(counts)])
    assert not found[silent].any()
    alone = [e for e in heard if sum(groups[j] == groups[e] for j in heard) == 1]
    if kind is not Baseline.reinforce_pp:
        assert not found[alone].any()
        heard = [e for e in heard if e not in alone]
    elif alone:
        return  # centred to 0, then compared with the step's mean
    if heard:
        rest = [returns[e] for e in heard], [groups[e] for e in heard], kind, [counts[e] for e in heard]
        assert found[heard] == pytest.approx(advantages(*rest), abs=1e-9)


@pytest.mark.parametrize("kind", ALL)
def test_a_group_with_one_episode_left_has_no_signal(kind: Baseline) -> None:
    """Returns 1 0 | 1 0 of which the last was not sampled: +-1/2 and 0, normalised."""
    found = advantages([1, 0, 1, 0], [0, 0, 1, 1], kind, [1, 1, 2, 0])
    assert found[0] > 0 > found[1]
    assert found[2:].tolist() == [0, 0]
    assert not advantages([1, 0, 1, 0], [0, 0, 1, 1], kind, [0, 0, 0, 0]).any()


def test_rewards_are_read_at_action_tokens_alone() -> None:
    (trace,) = sub_traces_of("a", [1, 2], [])
    trace = replace(trace, rewards=np.array([64, 1, 64, 2], np.float32))
    assert episode_returns([trace], ["a"], [0]).tolist() == [3]


def test_rewards_of_any_size_and_order_are_added_exactly() -> None:
    for rewards in ([2.0**60, 1, -(2.0**60)], [2.0**60, -(2.0**60), 1], [1, 2.0**60, -(2.0**60)]):
        assert episode_returns(sub_traces_of("a", rewards, [1]), ["a"], [0]).tolist() == [1]


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", GROUPED)
def test_a_group_of_one_is_refused(kind: Baseline) -> None:
    with pytest.raises(ValueError, match=f"baseline={kind.value} needs buffer.episodes_per_prompt of at least 2: grou"):
        advantages([1, 0, 1], [5, 5, 6], kind)
    with pytest.raises(ValueError, match="group 6 has one episode"):
        advantages([1, 0, 1], [5, 6, 5], kind)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, math.nan], [0, 0], Baseline.grpo), "return of episode 1 is nan"),
        (([1, math.inf], [0, 0], Baseline.rloo), "return of episode 1 is inf"),
        (([1, 0], [0, 0, 0], Baseline.rloo), "3 group numbers for 2 returns"),
        (([], [], Baseline.grpo), "no episodes"),
        (([1, 0], [0, 0], Baseline.critic), "baseline=critic"),
        (([1, 0], [0, 0], Baseline.reinforce_pp), "num_actions of 2 episodes: none are given"),
        (([1, 0], [0, 0], Baseline.reinforce_pp, [1]), "num_actions of 2 episodes: 1 are given"),
        (([1, 0], [0, 0], Baseline.reinforce_pp, [1, -2]), "num_actions of episode 1 is -2"),
        (([1, 0, 1], [0, 0, 1], Baseline.reinforce_pp, [1, 1, 1]), "1 of 2 groups have one episode"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(*arguments)


def test_a_step_in_which_nothing_was_sampled_has_no_signal() -> None:
    assert advantages([1, 0], [0, 0], Baseline.reinforce_pp, [0, 0]).tolist() == [0, 0]


def test_sub_traces_and_episodes_must_match() -> None:
    whole = sub_traces_of("a", [1, 0, 2], [1, 2])
    cases: list[tuple[list[SubTrace], list[str], list[float], str]] = [
        (whole, ["b"], [0], "episode a, sub-trace 0: its episode is not one of the 1 in episode_ids"),
        (whole, ["a", "b", "a"], [0, 0, 0], "episode a is in episode_ids twice"),
        (whole, ["a", "b"], [0], "1 terminal rewards for 2 episodes"),
        (whole, ["a", "b"], [0, math.nan], "episode b: reward is nan"),
        (whole[1:], ["a"], [0], r"episode a is not whole: sub-traces \[1, 2\]"),
        (whole[:2], ["a"], [0], r"episode a is not whole: sub-traces \[0, 1\] are given, without a FINAL"),
        ([*whole, whole[1]], ["a"], [0], r"episode a is not whole: sub-traces \[0, 1, 1, 2\]"),
    ]
    for given_traces, ids, terminal, message in cases:
        with pytest.raises(ValueError, match=message):
            episode_returns(given_traces, ids, terminal)
    for bad in (math.nan, math.inf):
        broken = replace(whole[1], rewards=np.array([bad, bad], np.float32))
        with pytest.raises(ValueError, match=f"episode a, sub-trace 1: reward at index 1 is {bad}"):
            episode_returns([whole[0], broken, whole[2]], ["a"], [0])
    one = np.zeros(1)
    with pytest.raises(ValueError, match="its episode is not one of the 1"):
        spread(whole, ["b"], one, one)
    with pytest.raises(ValueError, match="1 advantages for 2 episodes"):
        spread(whole, ["a", "b"], one, np.zeros(2))
    with pytest.raises(ValueError, match="1 returns for 2 episodes"):
        spread(whole, ["a", "b"], np.zeros(2), one)
