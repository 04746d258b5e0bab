"""What an episode goes on from when its window is full: pure functions on contexts, as token ids.

asks for a summary    context + request -> the policy writes the summary, a turn like any other: it is trained
compacts              (prompt, summary, exchanges) -> the next context, all of which is copied: not trained
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rollout.config import CompactionConfig
from rollout.rendering.messages import Context, Exchange, Prompt
from rollout.rendering.renderer import Renderer


class Compaction(Protocol):
    """A policy for a full window. It keeps no state: the loop holds the episode."""

    @property
    def asks(self) -> bool:
        """Return whether the policy is asked for a summary."""
        ...

    @property
    def summary_tokens(self) -> int:
        """Return the most tokens that a summary may have; 0 where none is asked for."""
        ...

    def compact(
        self, prompt: Prompt, summary_ids: Sequence[int], exchanges: Sequence[Exchange]
    ) -> tuple[Context, list[Exchange]]:
        """Return the context that the episode goes on from, and the exchanges in it.

        `summary_ids`: what the policy wrote, without the id that ends a turn. `exchanges`: all that are in the full
        context, the oldest first. The context leaves `reserve_tokens` of the window free unless it holds no exchange.
        """
        ...


def keep_last(exchanges: Sequence[Exchange], count: int, fits: Callable[[Sequence[Exchange]], bool]) -> list[Exchange]:
    """Return the last exchanges: at most `count`, and as many as fit."""
    kept = list(exchanges[-count:]) if count else []
    while kept and not fits(kept):
        kept = kept[1:]
    return kept


class PolicySummary:
    """The policy writes a summary: prompt, summary, the last exchanges."""

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
    """Nothing is asked of the policy: prompt and the last exchanges. What came before them is forgotten."""

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
