"""The renderer for built-in templates: it concatenates the ids of the messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rollout.rendering.messages import Context, Exchange, Prompt, message
from rollout.rendering.renderer import Renderer, without_middle
from rollout.rendering.templates import OWN_TEMPLATE, find_template


class BuiltinRenderer(Renderer):
    """Renders each message separately, so that a later message never changes the ids of an earlier one.

    A prompt is one user message without tools: its text describes the actions that the agent may take.
    """

    def __init__(self, tokenizer: Any, template: str, end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._name = template
        self._t = find_template(template)
        stop = self._markup(self._t.stop)
        if len(stop) != 1:
            raise ValueError(f"stop text {self._t.stop!r} is {len(stop)} tokens in this tokenizer; it must be one")
        super().__init__(tokenizer, stop[0], end_ids)
        self.compact_ids = self._markup(self._t.compact + self._t.reply)
        self.num_request = len(self.compact_ids)
        self.num_answer = self.num_closing + len(self.observation("", 0))

    def start(self, prompt: Prompt) -> Context:
        """Return the context of one user message. ValueError: the prompt has other messages or tools."""
        return Context(prompt.messages, (), tuple(self._opened(self._task(prompt))))

    def observe(self, context: Context, text: str, max_tokens: int) -> Context:
        """Return the context with a tool's answer; the answer loses its middle if it exceeds `max_tokens`."""
        ids = [*context.ids, *self.closing(context.ids)]
        added = message("tool", text)
        ids += self.observation(text, max_tokens - len(ids))
        return replace(context, messages=(*context.messages, added), ids=tuple(ids))

    def ask_summary(self, context: Context) -> Context:
        """Return the context with the request for a summary, after the text that opens the policy's turn."""
        asked = message("user", self._t.compact)
        return replace(context, messages=(*context.messages, asked), ids=(*context.ids, *self.compact_ids))

    def resume(self, prompt: Prompt, summary_ids: Sequence[int] | None, exchanges: Sequence[Exchange]) -> Context:
        """Return the context after a compaction; the ids of summary and exchanges are copied."""
        task, kept = self._task(prompt), [i for exchange in exchanges for i in exchange.ids]
        if summary_ids is None:
            ids = [*self._opened(task), *kept]
        else:
            ids = self.after_compaction(task, list(summary_ids), kept)
        return Context((*prompt.messages, *(m for one in exchanges for m in one.messages)), (), tuple(ids))

    def _task(self, prompt: Prompt) -> str:
        (first, *more), tools = prompt.messages, prompt.tools
        if more or tools or first.get("role") != "user" or not isinstance(first.get("content"), str):
            roles = ", ".join(str(one.get("role")) for one in prompt.messages)
            raise ValueError(
                f"model.template={self._name} renders one user message of text and no tools: this prompt has "
                f"{len(tools)} tools and the messages {roles}; use model.template={OWN_TEMPLATE}"
            )
        return str(first["content"])

    def _opened(self, text: str) -> list[int]:
        return self._wrapped(self._t.user, self._content(text), self._t.reply)

    def _wrapped(self, around: tuple[str, str], inner: list[int], after: str = "") -> list[int]:
        return [*self._markup(around[0]), *inner, *self._markup(around[1] + after)]

    def observation(self, text: str, max_tokens: int) -> list[int]:
        """Return the ids of a tool's answer and of the text that opens the policy's turn, at most `max_tokens`.

        A longer answer loses its middle.
        """
        room = max_tokens - len(self._wrapped(self._t.tool, [], self._t.reply))
        head, tail = without_middle(self._content(text), room)
        return self._wrapped(self._t.tool, [*head, *tail], self._t.reply)

    def after_compaction(self, task: str, summary_ids: list[int], kept_ids: list[int]) -> list[int]:
        """Return the ids of the context after a summary: task, summary, the kept exchanges."""
        opening = self._wrapped(self._t.user, self._content(task))
        return [*opening, *self._wrapped(self._t.summary, summary_ids, self._t.reply), *kept_ids]
