"""Compactions: the ids of the next context, and a task that chooses another player."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agents import CONTEXT, RESERVE, ROW, STOP, SUMMARY, TINY, TOOL, USER, Player, World, ids, settings_of

from buffer.tasks import TaskRow
from buffer.trace import cut
from buffer.types import TurnKind
from rollout.agents import player as seam
from rollout.agents.compaction import LastExchanges, PolicySummary, keep_last
from rollout.agents.loop import ToolLoop
from rollout.agents.player import Attempt
from rollout.config import RolloutConfig
from rollout.environment import Environment
from rollout.rendering.messages import Exchange, Prompt
from rollout.rendering.renderer import Renderer
from rollout.sandbox.interface import Sandbox
from rollout.task import Task

EXCHANGES = [Exchange((), (1, 1, 1)), Exchange((), (2, 2)), Exchange((), (3, 3, 3, 3))]


@pytest.mark.parametrize(
    ("count", "max_tokens", "kept"),
    [(3, 10, [0, 1, 2]), (9, 99, [0, 1, 2]), (3, 9, [1, 2]), (2, 10, [1, 2]), (3, 5, [2]), (3, 4, []), (0, 99, [])],
)
def test_the_last_exchanges_that_fit_are_kept(count: int, max_tokens: int, kept: list[int]) -> None:
    """One token of markup and exchanges of 3, 2 and 4 tokens."""
    chosen = [EXCHANGES[i] for i in kept]
    assert keep_last(EXCHANGES, count, lambda kept: 1 + sum(len(one.ids) for one in kept) <= max_tokens) == chosen


def test_a_context_too_long_for_any_exchange_holds_none() -> None:
    assert keep_last(EXCHANGES, 3, lambda kept: False) == []


def test_compactions_change_nothing_that_they_are_given() -> None:
    limits, prompt = settings_of(keep_steps=2).compaction, Prompt.of("u")
    exchanges = [Exchange((), tuple(ids(text))) for text in ("xk", "yl", "zm")]
    before = list(exchanges)
    task, tail = [USER, *ids("u"), STOP], ids("ylzm")
    context, kept = PolicySummary(TINY, limits).compact(prompt, ids("s"), exchanges)
    assert (list(context.ids), kept) == ([*task, SUMMARY, *ids("s"), STOP, *tail], exchanges[1:])
    context, kept = LastExchanges(TINY, limits).compact(prompt, [], exchanges)
    assert (list(context.ids), kept) == ([*task, *tail], exchanges[1:])
    assert exchanges == before


class Forgetful(Task):
    """A task that chooses its player."""

    def environment(self, row: TaskRow, sandbox: Sandbox) -> Environment:
        raise NotImplementedError

    def player(self, renderer: Renderer, config: RolloutConfig) -> seam.Player:
        return ToolLoop(renderer, config, LastExchanges(renderer, config.compaction))


def test_a_task_chooses_a_player_that_compacts_without_a_summary() -> None:
    """Both exchanges leave less than the reserve: only the second one is kept."""
    config = settings_of(keep_steps=1)
    sampler, world = Player("x", "y", "z"), World("u", "k" * (CONTEXT - RESERVE - 10), "l")
    episode = asyncio.run(Forgetful().player(TINY, config).play(Attempt("e", ROW, 0, world, sampler)))
    assert [turn.kind for turn in episode.turns] == [TurnKind.ACT] * 3  # no summary was requested
    y = [*ids("y"), STOP, TOOL, *ids("l"), STOP]
    assert episode.turns[2].prompt_ids.tolist() == [USER, *ids("u"), STOP, *y]
    first, second = cut(episode)
    assert first.tokens[first.action_mask].tolist() == [*ids("x"), STOP, *ids("y"), STOP]
    assert second.tokens[second.action_mask].tolist() == [*ids("z"), STOP]
    assert first.successor == (1, 0)


def test_a_task_that_chooses_nothing_is_played_by_the_loop_with_summaries() -> None:
    class Plain(Forgetful):
        player: Any = Task.player

    made = Plain().player(TINY, settings_of())
    assert isinstance(made, ToolLoop)
    assert isinstance(made.compaction, PolicySummary)


def test_without_a_summary_the_reserve_may_be_smaller() -> None:
    """2 tokens for an empty answer, none for a request or a summary."""
    config = settings_of(reserve_tokens=3, summary_tokens=2)
    Forgetful().player(TINY, config)
    with pytest.raises(ValueError, match="use at least 6"):
        ToolLoop(TINY, config)
