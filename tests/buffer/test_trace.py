"""The cut rule: every sampled token is trained once, in the context in which it was sampled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from episodes import random_episode
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.trace import cut
from buffer.types import Episode, Status, SubTraceKind, Turn, TurnKind


def turn(prompt: list[int], output: list[int], agent: int = 0, kind: TurnKind = TurnKind.ACT, version: int = 0) -> Turn:
    return Turn(
        prompt_ids=np.array(prompt, np.int32),
        output_ids=np.array(output, np.int32),
        logprobs=(-np.array(output) / 10).astype(np.float32),
        versions=np.full(len(output), version, np.int32),
        stale_mask=np.array(output) % 2 == 1,
        finish_reason="stop",
        kind=kind,
        agent=agent,
    )


def episode(*turns: Turn, parents: tuple[int, ...] = (-1,), **changes: object) -> Episode:
    whole = Episode("e", row=0, turns=turns, reward=1.0, status=Status.FINISHED, parents=parents)
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_worked_example_of_the_docstring() -> None:
    first, second = cut(
        episode(
            turn([1, 2], [3, 4]),
            turn([1, 2, 3, 4, 5], [6], version=1),
            turn([1, 2, 3, 4, 5, 6, 7], [8, 9], kind=TurnKind.SUMMARY, version=2),
            turn([1, 8, 9], [4], version=3),
        )
    )
    assert first.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert first.action_mask.tolist() == [False, False, True, True, False, True, False, True, True]
    assert first.summary_mask.tolist() == [False] * 7 + [True, True]
    assert first.versions.tolist() == [-1, -1, 0, 0, -1, 1, -1, 2, 2]
    assert np.flatnonzero(first.stale_mask).tolist() == [2, 8]  # of the odd ones, the sampled ones: 3 and 9
    assert first.logprobs == pytest.approx([0, 0, -0.3, -0.4, 0, -0.6, 0, -0.8, -0.9])
    assert (first.kind, first.position, first.successor) == (SubTraceKind.COMPACTED, 0, (1, 0))
    assert not first.rewards.any()
    assert second.tokens.tolist() == [1, 8, 9, 4]
    assert second.action_mask.tolist() == [False, False, False, True]
    assert not second.summary_mask.any()
    assert second.rewards.tolist() == [0, 0, 0, 1]
    assert (second.kind, second.position, second.successor) == (SubTraceKind.FINAL, 1, None)


def test_types_and_empty_tool_output() -> None:
    (trace,) = cut(episode(turn([1], [2]), turn([1, 2], [3])))
    assert trace.tokens.tolist() == [1, 2, 3]
    assert trace.action_mask.tolist() == [False, True, True]
    assert [trace.tokens.dtype, trace.logprobs.dtype, trace.rewards.dtype] == [np.int32, np.float32, np.float32]


def test_prompt_drift_inside_sampled_tokens_cuts() -> None:
    first, second = cut(episode(turn([1], [2, 3]), turn([1, 2, 4, 5], [6])))
    assert first.tokens.tolist() == [1, 2, 3]
    assert first.kind is SubTraceKind.COMPACTED
    assert first.successor == (1, 0)
    assert second.action_mask.tolist() == [False, False, False, False, True]


def test_prompt_shorter_than_the_history_cuts() -> None:
    assert len(cut(episode(turn([1, 2], [3]), turn([1, 2], [4])))) == 2


def test_nested_and_parallel_sub_agents() -> None:
    """The root starts 1 and 2 concurrently, 1 starts 3; the root continues in the same context, twice."""
    traces = cut(
        episode(
            turn([1], [10, 11]),
            turn([2], [20], agent=1),
            turn([3], [30], agent=2),
            turn([4], [40], agent=3),
            turn([2, 20, 5], [21], agent=1),
            turn([3, 6], [31], agent=2),
            turn([1, 10, 11, 7], [12]),
            turn([1, 10, 11, 7, 12], [13]),
            parents=(-1, 0, 0, 1),
        )
    )
    assert [trace.tokens[trace.action_mask].tolist() for trace in traces] == [
        [10, 11, 12, 13],
        [20, 21],
        [30],
        [40],
        [31],
    ]
    assert [trace.successor for trace in traces] == [None, (0, 2), (4, 0), (1, 1), (0, 2)]
    assert [trace.kind for trace in traces] == [SubTraceKind.FINAL] + [SubTraceKind.SUB_AGENT] * 4
    assert [trace.position for trace in traces] == [0, 1, 2, 3, 4]
    assert [float(trace.rewards.sum()) for trace in traces] == [1, 0, 0, 0, 0]


def test_sub_agent_whose_parent_never_acts_again_leads_to_the_grandparent_or_nowhere() -> None:
    turns = turn([1], [10]), turn([2], [20], agent=1), turn([3], [30], agent=2)
    traces = cut(episode(*turns, turn([1, 10], [11]), parents=(-1, 0, 1)))
    assert [trace.successor for trace in traces] == [None, (0, 1), (0, 1)]
    traces = cut(episode(*turns, parents=(-1, 0, 1), status=Status.TRUNCATED))
    assert [trace.successor for trace in traces] == [None, None, None]
    assert traces[0].rewards.tolist() == [0, 1]


def test_turns_without_output_are_left_out() -> None:
    full = turn([1], [2]), turn([1, 2, 3], [4])
    (plain,) = cut(episode(*full))
    (with_empty,) = cut(episode(turn([9], []), full[0], turn([1, 2, 3], []), full[1], turn([1, 2, 3, 4], [])))
    assert with_empty.tokens.tolist() == plain.tokens.tolist()
    assert with_empty.rewards.tolist() == [0, 0, 0, 1]
    assert cut(episode(turn([1], []))) == ()


def test_last_turn_that_was_cut_carries_reward_and_status() -> None:
    last = replace(turn([1, 2], [3, 4]), finish_reason="length")
    (trace,) = cut(episode(turn([1], [2]), last, status=Status.TRUNCATED, reward=0.25))
    assert trace.rewards.tolist() == [0, 0, 0, 0.25]
    assert trace.status is Status.TRUNCATED


def test_rewards_of_turns_stand_on_their_last_tokens() -> None:
    """A cut after the summary; the last turn's own reward and the terminal one (1) share a token."""
    first, second = cut(
        episode(
            replace(turn([1, 2], [3, 4]), reward=0.5),
            turn([1, 2, 3, 4, 5], [6]),
            replace(turn([1, 2, 3, 4, 5, 6, 7], [8, 9], kind=TurnKind.SUMMARY), reward=-2.0),
            replace(turn([1, 8, 9], [4, 3]), reward=0.25),
        )
    )
    assert first.rewards.tolist() == [0, 0, 0, 0.5, 0, 0, 0, 0, -2]
    assert second.rewards.tolist() == [0, 0, 0, 0, 1.25]
    root, child = cut(
        episode(turn([1], [2]), replace(turn([5], [6, 7], agent=1), reward=3.0), turn([1, 2], [3]), parents=(-1, 0))
    )
    assert root.rewards.tolist() == [0, 0, 1]
    assert child.rewards.tolist() == [0, 0, 3]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (episode(turn([1], [2]), status=Status.FAILED, error="engine died"), "engine died"),
        (episode(turn([], [2])), "prompt_ids is empty"),
        (episode(turn([1], [2], agent=1)), "agent 1"),
        (episode(turn([1], [2]), reward=float("nan")), "reward"),
        (episode(turn([1], [2]), replace(turn([1, 2], [3]), reward=float("nan"))), "turn 1: reward is nan"),
        (episode(replace(turn([1], [2]), reward=float("-inf"))), "turn 0: reward is -inf"),
        (episode(turn([1], [2]), replace(turn([1, 2], []), reward=0.5)), "turn 1: reward 0.5 for a turn without out"),
        (episode(replace(turn([1], []), reward=0.5)), "turn 0: reward 0.5 for a turn without output"),
        (episode(turn([1], [2]), parents=(-1, 2, 0)), r"parents\[1\]=2"),
        (episode(turn([1], [2], agent=1), parents=(-1, 0)), "root agent"),
        (episode(replace(turn([1], [2]), logprobs=np.zeros(2, np.float32))), r"\(1, 2, 1, 1\)"),
    ],
)
def test_bad_episodes_are_refused(broken: Episode, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(broken)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_random_episodes(seed: int) -> None:
    whole = random_episode(seed)
    rng = np.random.default_rng(seed)
    turns = (replace(t, reward=float(rng.integers(-4, 5)) * bool(len(t.output_ids))) for t in whole.turns)
    whole = replace(whole, turns=tuple(turns))
    traces = cut(whole)
    earned = {}  # serial of a sampled token -> its reward
    contexts = {}  # serial of a sampled token -> the tokens up to and including it
    for position, trace in enumerate(traces):
        assert trace.position == position
        assert not trace.action_mask[0]
        assert not trace.logprobs[~trace.action_mask].any()
        assert set(trace.versions[~trace.action_mask].tolist()) <= {-1}
        assert not (trace.summary_mask & ~trace.action_mask).any()
        assert not (trace.stale_mask & ~trace.action_mask).any()
        for index in np.flatnonzero(trace.action_mask):
            serial = trace.logprobs[index].item()
            assert serial not in contexts
            contexts[serial] = trace.tokens[: index + 1].tolist()
            earned[serial] = float(trace.rewards[index])
        assert not trace.rewards[~trace.action_mask].any()
    for given_turn in whole.turns:
        tokens = [*given_turn.prompt_ids.tolist(), *given_turn.output_ids.tolist()]
        for place, serial in enumerate(given_turn.logprobs.tolist()):
            assert contexts.pop(serial) == tokens[: len(given_turn.prompt_ids) + place + 1]
    assert contexts == {}
    of_root = [t for t in whole.turns if t.agent == 0 and len(t.output_ids)]
    earned[float(of_root[-1].logprobs[-1])] -= whole.reward
    for given_turn in whole.turns:
        for serial in given_turn.logprobs.tolist():
            assert earned[serial] == (given_turn.reward if serial == given_turn.logprobs[-1] else 0)
    assert [trace.kind for trace in traces].count(SubTraceKind.FINAL) == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_successors_lead_forward_in_time_to_the_end(seed: int) -> None:
    traces = cut(random_episode(seed))
    for trace in traces:
        if trace.successor is None:
            continue
        follower = traces[trace.successor.position]
        times = -follower.logprobs[follower.action_mask]  # serials grow with time
        mine = -trace.logprobs[trace.action_mask].min()
        assert times[trace.successor.action] > mine
        if trace.kind is SubTraceKind.COMPACTED:
            assert trace.successor.action == 0
        if follower.kind is SubTraceKind.SUB_AGENT:
            assert trace.kind is SubTraceKind.SUB_AGENT
