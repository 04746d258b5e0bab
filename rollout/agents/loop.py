"""The tool-calling loop: plays one episode from prompt to reward.

context = prompt
loop:  if less than `reserve_tokens` of the window is left:
           compact the context; the policy first writes a summary if the compaction asks for one
       the policy acts, the environment answers, and both are appended to the context
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from buffer.types import Episode, Status, Turn, TurnKind
from rollout.agents.compaction import Compaction, PolicySummary
from rollout.agents.player import Attempt, EpisodeAborted
from rollout.config import RolloutConfig
from rollout.environment import as_prompt, as_reward, as_step, awaited
from rollout.rendering.messages import Context, Exchange, Prompt
from rollout.rendering.renderer import Renderer


@dataclass
class _State:
    """The state of one episode."""

    attempt: Attempt
    prompt: Prompt
    context: Context
    turns: list[Turn] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)  # in the current context
    num_actions: int = 0
    num_compactions: int = 0

    def left(self, context_tokens: int) -> int:
        """Return the number of tokens left in the window."""
        return context_tokens - len(self.context.ids)


class ToolLoop:
    """A player that alternates actions and observations: each action is one turn, and its answer joins the context."""

    def __init__(self, renderer: Renderer, config: RolloutConfig, compaction: Compaction | None = None) -> None:
        """`compaction`: None selects a summary written by the policy.

        ValueError: `reserve_tokens` leaves no room for a turn.
        """
        self.renderer = renderer
        self.config = config
        self.compaction = compaction or PolicySummary(renderer, config.compaction)
        limits = config.compaction
        # Every turn leaves room for an empty tool answer, the request for a summary, and the summary itself.
        self._compaction_tokens = self.compaction.asks * renderer.num_request + self.compaction.summary_tokens
        self._held_back = renderer.num_answer + self._compaction_tokens
        if limits.reserve_tokens <= self._held_back:
            raise ValueError(
                f"rollout.compaction.reserve_tokens={limits.reserve_tokens} leaves no room for a turn: summary_tokens="
                f"{self.compaction.summary_tokens} and the template take {self._held_back} tokens; use at least "
                f"{self._held_back + 1}"
            )

    async def play(self, attempt: Attempt) -> Episode:
        """Play one attempt.

        ValueError: the environment returned an invalid value; the message names episode and row.
        """
        name, row, environment = attempt.name, attempt.row, attempt.environment
        prompt = as_prompt(await awaited(environment.start(), f"{name}: the prompt"), f"{name}: the prompt")
        state = _State(attempt, prompt, self.renderer.start(prompt))
        prompt_tokens = len(state.context.ids)
        status = await self._play(state, row.budgets.get("max_turns", self.config.max_turns))
        reward = as_reward(await awaited(environment.reward(), f"{name}: reward"), f"{name}: reward")
        return Episode(
            attempt.episode_id, attempt.row_index, tuple(state.turns), reward, status, prompt_tokens=prompt_tokens
        )

    async def _play(self, state: _State, max_turns: int) -> Status:
        limits = self.config.compaction
        while True:
            if state.left(limits.context_tokens) < limits.reserve_tokens:
                if state.num_compactions == limits.max_compactions or not state.turns:
                    return Status.TRUNCATED  # without turns, the prompt fills the window: nothing can be compacted
                if not await self._compact(state) or state.left(limits.context_tokens) < limits.reserve_tokens:
                    return Status.TRUNCATED  # prompt and summary alone fill the window
            room = state.left(limits.context_tokens) - self._held_back
            turn = await self._turn(state, TurnKind.ACT, min(self.config.max_turn_tokens, room))
            if turn.finish_reason == "length":
                return Status.TRUNCATED
            state.num_actions += 1
            what = f"{state.attempt.name}, turn {len(state.turns) - 1}"
            step = state.attempt.environment.step(state.context.messages[-1]["content"])
            answer = as_step(await awaited(step, f"{what}: the step"), what)
            state.turns[-1] = replace(turn, observation=answer.observation, reward=answer.reward)
            if answer.done:
                return Status.FINISHED
            if state.num_actions >= max_turns:
                return Status.TRUNCATED
            self._observe(state, turn, answer.observation)

    async def _turn(self, state: _State, kind: TurnKind, max_tokens: int) -> Turn:
        prompt_ids = list(state.context.ids)
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
        text = self.renderer.sampled_text(sampled.output_ids)
        state.context = state.context.answered(sampled.output_ids.tolist(), text)
        return turn

    def _observe(self, state: _State, turn: Turn, observation: str) -> None:
        max_tokens = self.config.compaction.context_tokens - self._compaction_tokens
        state.context = self.renderer.observe(state.context, observation, max_tokens)
        added = state.context.ids[len(turn.prompt_ids) :]
        state.exchanges.append(Exchange(state.context.messages[-2:], added))

    async def _compact(self, state: _State) -> bool:
        """Compact the context. Return False if there is no room for a summary.

        This happens when the template renders the request for a summary longer than it measured at the start.
        """
        summary: list[int] = []
        if self.compaction.asks:
            state.context = self.renderer.ask_summary(state.context)
            room = min(self.compaction.summary_tokens, state.left(self.config.compaction.context_tokens))
            if room < 1:
                return False
            turn = await self._turn(state, TurnKind.SUMMARY, room)
            summary = self.renderer.said(turn.output_ids)
        state.num_compactions += 1
        state.context, state.exchanges = self.compaction.compact(state.prompt, summary, state.exchanges)
        return True
