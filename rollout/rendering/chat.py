"""The renderer for the tokenizer's own chat template.

A chat template renders a whole conversation as text. It may render the past differently when the conversation grows:
some templates drop old reasoning, some merge consecutive messages. Token in, token out still holds. When messages are
added after the policy's answer, the text of the whole conversation is compared with the text up to the answer:

    same prefix         splice: keep the ids that the engine saw and sampled, and append the ids of the remaining text
    different prefix    the template has rewritten the past: use the ids of the whole text. The next turn's prompt does
                        not extend the previous one, so the cut rule (buffer/trace.py) begins a new sub-trace

Markup in external text is replaced by placeholders before the template runs, and restored as plain text afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jinja2.exceptions import TemplateError

from buffer.text import clean_text
from rollout.rendering.messages import Context, Exchange, Message, Prompt, Tool, message
from rollout.rendering.renderer import Renderer, without_middle
from rollout.rendering.templates import NO_CHAT_TEMPLATE, SUMMARY_HEADING, SUMMARY_REQUEST, TEMPLATES

# A placeholder is the number of a piece of markup between these two characters of Unicode's private use area.
BEGIN, END = "\ue000", "\ue001"
SHIELDED = re.compile(f"{BEGIN}([0-9]+){END}")
PROBE = "slime"  # a word that no template changes


class ChatRenderer(Renderer):
    """Renders messages by the tokenizer's chat template: system message, tools, reasoning, tool results."""

    def __init__(self, tokenizer: Any, end_ids: Iterable[int] = ()) -> None:
        """Look up how the template closes the policy's turns and whether it renders tool results.

        ValueError: the tokenizer has no chat template, or the template can't render an episode.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"the tokenizer {NO_CHAT_TEMPLATE}")
        self._tokenizer = tokenizer
        # BEGIN and END are replaced, too, so that external text can't contain a placeholder.
        self._marks = [*sorted(set(tokenizer.all_special_tokens) - {tokenizer.unk_token}, key=len), BEGIN, END]
        self._mark = re.compile("|".join(re.escape(mark) for mark in reversed(self._marks)))
        self._stop = self._find_stop()
        super().__init__(tokenizer, tokenizer.convert_tokens_to_ids(self._stop), end_ids)
        self._role = self._find_role()
        self._measure()

    def _find_stop(self) -> str:
        """Return the token that closes the policy's turns."""
        try:
            text = self._text((message("user", ""), message("assistant", PROBE)), ())
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template renders no conversation: {error}") from error
        _, found, closing = text.rpartition(PROBE)
        stop = next((mark for mark in self._marks if found and closing.startswith(mark)), None)
        if stop is None:
            raise ValueError(
                f"the tokenizer's chat template closes a turn with {closing!r}, which begins with no special token: "
                f"use model.template={' or '.join(TEMPLATES)}"
            )
        return stop

    def _find_role(self) -> str:
        """Return the role of an environment's answers: "tool", or "user" if the template renders no tool results."""
        said = message("user", ""), message("assistant", "")
        for role in ("tool", "user"):
            try:
                shown = PROBE in self._text((*said, message(role, PROBE)), ())
            except TemplateError:
                shown = False
            if shown:
                return role
        raise ValueError(
            "the tokenizer's chat template renders neither tool results nor a second user message: "
            f"use model.template={' or '.join(TEMPLATES)}"
        )

    def _measure(self) -> None:
        """Measure the tokens of an empty answer and of a request for a summary, in a short conversation."""
        said = self.start(Prompt.of(PROBE)).answered([self.stop_id], "")
        answered = self._extended(said, [message(self._role, "")])
        self.num_answer = self.num_closing + max(0, len(answered.ids) - len(said.ids))
        self.num_request = max(0, len(self.ask_summary(answered).ids) - len(answered.ids))

    # --- the interface

    def start(self, prompt: Prompt) -> Context:
        """Return the context of a conversation. ValueError: the template can't render it."""
        try:
            return self._rendered(prompt.messages, prompt.tools)
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template can't render the prompt: {error}") from error

    def observe(self, context: Context, text: str, max_tokens: int) -> Context:
        """Return the context with an environment's answer; the answer loses its middle if it exceeds `max_tokens`."""
        content = self._content(text)
        keep = len(content)
        found = self._extended(context, [message(self._role, text)])
        while len(found.ids) > max_tokens and keep:
            keep = max(0, keep - (len(found.ids) - max_tokens))
            head, tail = without_middle(content, keep)
            found = self._extended(context, [message(self._role, self._text_of(head) + self._text_of(tail))])
        return found

    def ask_summary(self, context: Context) -> Context:
        """Return the context with a user message that requests a summary.

        If the template requires alternating roles, the request is appended to the last message.
        """
        try:
            return self._extended(context, [message("user", SUMMARY_REQUEST)])
        except TemplateError:
            return self._extended(context, [_continued(context.messages[-1], SUMMARY_REQUEST)], dropped=1)

    def resume(self, prompt: Prompt, summary_ids: Sequence[int] | None, exchanges: Sequence[Exchange]) -> Context:
        """Return the context after a compaction, rendered again as a whole.

        The summary is appended to the prompt's last message; if that is not text, it is a user message of its own.
        """
        *before, last = prompt.messages
        if summary_ids is not None:
            summary = f"{SUMMARY_HEADING}{self._text_of(summary_ids)}"
            if isinstance(last.get("content"), str):
                last = _continued(last, summary)
            else:
                before, last = [*before, last], message("user", summary)
        return self._rendered((*before, last, *(m for one in exchanges for m in one.messages)), prompt.tools)

    # --- rendering

    def _rendered(self, messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> Context:
        return Context(messages, tools, tuple(self._encoded(self._text(messages, tools, opened=True))))

    def _extended(self, context: Context, added: Sequence[Message], dropped: int = 0) -> Context:
        """Replace the last `dropped` messages of the context by `added`; splice the ids if the past is unchanged."""
        messages, tools = (*context.messages[: len(context.messages) - dropped], *added), context.tools
        if not context.num_known:
            return self._rendered(messages, tools)
        full = self._text(messages, tools, opened=True)
        last = max(place for place, one in enumerate(context.messages) if one.get("role") == "assistant")
        known = context.ids[: context.num_known]
        for past in self._pasts(context.messages[: last + 1], tools):
            if full.startswith(past):
                ids = (*known, *self.closing(known), *self._encoded(full[len(past) :]))
                return replace(context, messages=messages, ids=ids)
        return self._rendered(messages, tools)

    def _pasts(self, messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> Iterator[str]:
        """Yield the text up to the end of the policy's answer: as the engine saw it, and as the template renders it.

        They differ if the template changes an answer, for example by adding reasoning or dropping spaces.
        """
        answer: str = self._shielded(messages[-1]["content"])
        yield f"{self._text(messages[:-1], tools, opened=True)}{answer}{self._stop}"
        closed = self._text(messages, tools)
        yield closed[: closed.rindex(self._stop) + len(self._stop)]

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool], opened: bool = False) -> str:
        """Return the conversation as text, with placeholders for external markup; `opened`: open the policy's turn."""
        text: str = self._tokenizer.apply_chat_template(
            self._shielded(messages), tools=self._shielded(tools) or None, tokenize=False, add_generation_prompt=opened
        )
        return text

    def _shielded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._mark.sub(lambda found: f"{BEGIN}{self._marks.index(found[0])}{END}", clean_text(value))
        if isinstance(value, Mapping):
            return {key: self._shielded(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._shielded(inner) for inner in value]
        return value

    def _encoded(self, text: str) -> list[int]:
        """Return the ids of a rendered text: the template's markup as special tokens, external markup as plain text."""
        pieces = SHIELDED.split(text)
        return [
            i
            for place, piece in enumerate(pieces)
            for i in (self._content(self._marks[int(piece)]) if place % 2 else self._markup(piece))
        ]


def _continued(last: Message, text: str) -> Message:
    return {**last, "content": f"{last['content']}\n\n{text}"}
