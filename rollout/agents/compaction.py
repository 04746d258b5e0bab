"""Compaction of a full context window: pure functions on contexts, which are token ids.

request a summary    context + request -> the policy writes the summary. This is an ordinary turn: it is trained.
compact              (prompt, summary, exchanges) -> the next context. All of it is copied: it is not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rollout.config import CompactionConfig
from rollout.rendering.messages import Context, Exchange, Prompt
from rollout.rendering.renderer import Renderer


class Compaction(Protocol):
    """A strategy for a full window. It is stateless: the loop holds the episode."""

    @property
    def asks(self) -> bool:
        """Return whether the policy writes a summary."""
        ...

    @property
    def summary_tokens(self) -> int:
        """Return the maximum number of tokens in a summary; 0 if the policy writes none."""
        ...

    def compact(
        self, prompt: Prompt, summary_ids: Sequence[int], exchanges: Sequence[Exchange]
    ) -> tuple[Context, list[Exchange]]:
        """Return the context with which the episode continues, and the exchanges in it.

        `summary_ids`: the policy's summary, without the id that ends a turn. `exchanges`: all exchanges of the full
        context, oldest first. The new context leaves `reserve_tokens` of the window free unless it contains no
        exchange.
        """
        ...


def keep_last(exchanges: Sequence[Exchange], count: int, fits: Callable[[Sequence[Exchange]], bool]) -> list[Exchange]:
    """Return the last exchanges: as many as fit, at most `count`."""
    kept = list(exchanges[-count:]) if count else []
    while kept and not fits(kept):
        kept = kept[1:]
    return kept


class PolicySummary:
    """Continue from the prompt, a summary written by the policy, and the last exchanges."""

    asks = True

    def __init__(self, renderer: Renderer, limits: CompactionConfig) -> None:
        self._renderer = renderer
        self._limits = limits
        self.summary_tokens = limits.summary_tokens

    def compact(
        self, prompt: Prompt, summary_ids: Sequence[int], exchanges: Sequence[Exchange]
    ) -> tuple[Context, list[Exchange]]:
        """Return prompt, summary and the last `keep_steps` exchanges, fewer if they do not fit."""
        return _compacted(self._renderer, self._limits, prompt, summary_ids, exchanges)


class LastExchanges:
    """Continue from the prompt and the last exchanges, without a summary. Earlier exchanges are dropped."""

    asks = False
    summary_tokens = 0

    def __init__(self, renderer: Renderer, limits: CompactionConfig) -> None:
        self._renderer = renderer
        self._limits = limits

    def compact(
        self, prompt: Prompt, summary_ids: Sequence[int], exchanges: Sequence[Exchange]
    ) -> tuple[Context, list[Exchange]]:
        """Return the prompt and the last `keep_steps` exchanges, fewer if they do not fit."""
        return _compacted(self._renderer, self._limits, prompt, None, exchanges)


def _compacted(
    renderer: Renderer,
    limits: CompactionConfig,
    prompt: Prompt,
    summary_ids: Sequence[int] | None,
    exchanges: Sequence[Exchange],
) -> tuple[Context, list[Exchange]]:
    def build(kept: Sequence[Exchange]) -> Context:
        return renderer.resume(prompt, summary_ids, kept)

    kept = keep_last(exchanges, limits.keep_steps, lambda some: len(build(some).ids) <= limits.max_prompt_tokens)
    return build(kept), kept
