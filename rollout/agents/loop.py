"""The tool-calling loop: one episode from prompt to reward.

context = task
loop:  if less than `reserve_tokens` of the window is left:
           the context is compacted, after a summary by the policy when the compaction asks for one
       the policy acts; the environment answers; both are appended to the context
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from buffer.types import Episode, Status, Turn, TurnKind
from rollout.agents.compaction import Compaction, PolicySummary
from rollout.agents.player import Attempt, EpisodeAborted
from rollout.config import RolloutConfig
from rollout.environment import as_reward, as_step, as_text, awaited
from rollout.rendering.renderer import Renderer


@dataclass
class _State:
    """Where an episode stands."""

    attempt: Attempt
    task: str
    context: list[int]
    turns: list[Turn] = field(default_factory=list)
    exchanges: list[list[int]] = field(default_factory=list)  # ids of each (action, observation) in this context
    num_actions: int = 0
    num_compactions: int = 0


class ToolLoop:
    """The player that acts and observes in turn: an action is one turn, its answer is appended to the context."""

    def __init__(self, renderer: Renderer, config: RolloutConfig, compaction: Compaction | None = None) -> None:
        """`compaction`: None for a summary by the policy."""
        self.renderer = renderer
        self.config = config
        self.compaction = compaction or PolicySummary(renderer, config.compaction)
        limits = config.compaction
        # Held back from every turn: room for a tool's empty answer, and for the request to summarize with its summary.
        self._compaction_tokens = len(self.compaction.request_ids) + self.compaction.summary_tokens
        self._held_back = renderer.num_closing + len(renderer.observation("", 0)) + self._compaction_tokens
        if limits.reserve_tokens <= self._held_back:
            raise ValueError(
                f"rollout.compaction.reserve_tokens={limits.reserve_tokens} leaves no room for a turn: summary_tokens="
                f"{self.compaction.summary_tokens} and the template take {self._held_back}; use at least "
                f"{self._held_back + 1}"
            )

    async def play(self, attempt: Attempt) -> Episode:
        """Play one attempt.

        ValueError: the environment answered what can't be played or trained; the message names episode and row.
        """
        name, row, environment = attempt.name, attempt.row, attempt.environment
        task = as_text(await awaited(environment.start(), f"{name}: the prompt"), f"{name}: the prompt")
        state = _State(attempt, task, self.renderer.prompt(task))
        prompt_tokens = len(state.context)
        status = await self._play(state, row.budgets.get("max_turns", self.config.max_turns))
        reward = as_reward(await awaited(environment.reward(), f"{name}: reward"), f"{name}: reward")
        return Episode(
            attempt.episode_id, attempt.row_index, tuple(state.turns), reward, status, prompt_tokens=prompt_tokens
        )

    async def _play(self, state: _State, max_turns: int) -> Status:
        limits = self.config.compaction
        while True:
            if limits.context_tokens - len(state.context) < limits.reserve_tokens:
                if state.num_compactions == limits.max_compactions or not state.turns:
                    return Status.TRUNCATED  # without turns there is nothing to compact: the task fills the window
                await self._compact(state)
                if limits.context_tokens - len(state.context) < limits.reserve_tokens:
                    return Status.TRUNCATED  # task and summary alone fill the window
            room = limits.context_tokens - len(state.context) - self._held_back
            turn = await self._turn(state, TurnKind.ACT, min(self.config.max_turn_tokens, room))
            if turn.finish_reason == "length":
                return Status.TRUNCATED
            state.num_actions += 1
            what = f"{state.attempt.name}, turn {len(state.turns) - 1}"
            step = state.attempt.environment.step(self.renderer.sampled_text(turn.output_ids))
            answer = as_step(await awaited(step, f"{what}: the step"), what)
            state.turns[-1] = replace(turn, observation=answer.observation, reward=answer.reward)
            if answer.done:
                return Status.FINISHED
            if state.num_actions >= max_turns:
                return Status.TRUNCATED
            self._observe(state, turn, answer.observation)

    async def _turn(self, state: _State, kind: TurnKind, max_tokens: int) -> Turn:
        prompt_ids = list(state.context)
        sampled = await state.attempt.sampler.sample(prompt_ids, max_tokens, kind)
        if sampled.finish_reason == "abort":
            raise EpisodeAborted(f"the engine aborted turn {len(state.turns)}")
        turn = Turn(
            prompt_ids=np.asarray(prompt_ids, np.int32),
            output_ids=sampled.output_ids,
            logprobs=sampled.logprobs,
            versions=sampled.versions,
            stale_mask=sampled.stale_mask,
            finish_reason=sampled.finish_reason,
            kind=kind,
        )
        state.turns.append(turn)
        state.context += sampled.output_ids.tolist()
        return turn

    def _observe(self, state: _State, turn: Turn, observation: str) -> None:
        closing = self.renderer.closing(turn.output_ids)
        room = self.config.compaction.context_tokens - len(state.context) - len(closing) - self._compaction_tokens
        ids = [*closing, *self.renderer.observation(observation, room)]
        state.context += ids
        state.exchanges.append([*turn.output_ids.tolist(), *ids])

    async def _compact(self, state: _State) -> None:
        summary: list[int] = []
        if self.compaction.request_ids:
            state.context += self.compaction.request_ids
            turn = await self._turn(state, TurnKind.SUMMARY, self.compaction.summary_tokens)
            summary = self.renderer.said(turn.output_ids)
        state.num_compactions += 1
        state.context, state.exchanges = self.compaction.compact(state.task, summary, state.exchanges)
