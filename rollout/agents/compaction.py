"""What an episode goes on from when its window is full: pure functions on token ids.

    asks for a summary    context + request -> the policy writes the summary, a turn like any other: it is trained
    compacts              (task, summary, exchanges) -> the next context, in which all of these are copies: not trained

An exchange is one action of the policy with the environment's answer to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rollout.config import CompactionConfig
from rollout.rendering.renderer import Renderer

Ids = list[int]


class Compaction(Protocol):
    """A policy for a full window. It keeps no state: the loop holds the episode."""

    @property
    def request_ids(self) -> Ids:
        """Return the ids, appended to the context, that ask the policy for a summary; none: it is not asked."""
        ...

    @property
    def summary_tokens(self) -> int:
        """Return the most tokens that a summary may have."""
        ...

    def compact(self, task: str, summary_ids: Ids, exchanges: Sequence[Ids]) -> tuple[Ids, list[Ids]]:
        """Return the context that the episode goes on from, and the exchanges in it.

        `summary_ids`: what the policy wrote, without the id that ends a turn. `exchanges`: all that are in the full
        context, the oldest first. The context leaves `reserve_tokens` of the window free unless it holds no exchange.
        """
        ...


def keep_last(
    build: Callable[[Ids], Ids], exchanges: Sequence[Ids], count: int, max_tokens: int
) -> tuple[Ids, list[Ids]]:
    """Return `build` of the last exchanges, at most `count` and as many as fit in `max_tokens`, and these exchanges.

    `build` makes a context of the exchanges' ids, joined. It may be longer than `max_tokens` with none of them.
    """
    kept = list(exchanges[-count:]) if count else []
    while True:
        context = build([i for exchange in kept for i in exchange])
        if not kept or len(context) <= max_tokens:
            return context, kept
        kept = kept[1:]


class PolicySummary:
    """The policy writes a summary: task, summary, the last exchanges."""

    def __init__(self, renderer: Renderer, limits: CompactionConfig) -> None:
        self._renderer = renderer
        self._limits = limits
        self.request_ids = renderer.compact_ids
        self.summary_tokens = limits.summary_tokens

    def compact(self, task: str, summary_ids: Ids, exchanges: Sequence[Ids]) -> tuple[Ids, list[Ids]]:
        """Return task, summary and the last `keep_steps` exchanges, fewer if they do not fit."""

        def build(kept: Ids) -> Ids:
            return self._renderer.after_compaction(task, summary_ids, kept)

        return keep_last(build, exchanges, self._limits.keep_steps, self._limits.max_prompt_tokens)


class LastExchanges:
    """Nothing is asked of the policy: task and the last exchanges. What came before them is forgotten."""

    request_ids: Ids = []  # noqa: RUF012 (never changed)
    summary_tokens = 0

    def __init__(self, renderer: Renderer, limits: CompactionConfig) -> None:
        self._renderer = renderer
        self._limits = limits

    def compact(self, task: str, summary_ids: Ids, exchanges: Sequence[Ids]) -> tuple[Ids, list[Ids]]:
        """Return the task and the last `keep_steps` exchanges, fewer if they do not fit."""

        def build(kept: Ids) -> Ids:
            return [*self._renderer.prompt(task), *kept]

        return keep_last(build, exchanges, self._limits.keep_steps, self._limits.max_prompt_tokens)
