"""The renderer interface: converts messages to token ids, each message once.

Sampled ids are never decoded and encoded again. A context is assembled from ids, so that training sees the same tokens
as the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from buffer.text import clean_text
from rollout.rendering.messages import Context, Exchange, Prompt


class Renderer(ABC):
    """Builds contexts for one tokenizer and template.

    The policy ends its turn with the template's stop id, one of `end_ids`, or the tokenizer's end of sequence. The
    context keeps that id as it was sampled. The environment's input, and a summary that is carried over, do not contain
    it.
    """

    num_request: int  # tokens of the request for a summary
    num_answer: int  # tokens of an environment's empty answer, including the one that closes the policy's turn

    def __init__(self, tokenizer: Any, stop_id: int, end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.stop_id = stop_id
        end = tokenizer.eos_token_id
        self.stop_ids = frozenset([self.stop_id, *end_ids, *([] if end is None else [end])])
        self.num_closing = min(1, len(self.stop_ids) - 1)  # maximum number of ids that `closing` returns
        unknown = tokenizer.unk_token_id
        self._reserved = frozenset(tokenizer.all_special_ids) - {unknown}
        self._in_its_place = [] if unknown is None else [unknown]

    @abstractmethod
    def start(self, prompt: Prompt) -> Context:
        """Return the context of a prompt, up to where the policy's turn begins.

        ValueError: the template can't render the prompt.
        """

    @abstractmethod
    def observe(self, context: Context, text: str, max_tokens: int) -> Context:
        """Return the context with an environment's answer, up to where the policy's next turn begins.

        The answer loses its middle if the context would exceed `max_tokens`.
        """

    @abstractmethod
    def ask_summary(self, context: Context) -> Context:
        """Return the context with the request for a summary, up to where the policy's turn begins."""

    @abstractmethod
    def resume(self, prompt: Prompt, summary_ids: Sequence[int] | None, exchanges: Sequence[Exchange]) -> Context:
        """Return the context after a compaction: prompt, summary (None: no summary), exchanges."""

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt of one user message, up to where the policy's turn begins."""
        return list(self.start(Prompt.of(text)).ids)

    def _markup(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _content(self, text: str) -> list[int]:
        """Return the ids of external text. Markup in it is encoded as plain text.

        If a character of the text is itself a special token of the vocabulary, it becomes <unk>.
        """
        if not text:
            return []
        ids: list[int] = self._tokenizer.encode(clean_text(text), add_special_tokens=False, split_special_tokens=True)
        if self._reserved.isdisjoint(ids):
            return ids
        return [kept for i in ids for kept in (self._in_its_place if i in self._reserved else [i])]

    def closing(self, output_ids: Sequence[int] | np.ndarray) -> list[int]:
        """Return the ids that close a turn as the template does: [] after the stop id, else the stop id."""
        return [] if len(output_ids) and output_ids[-1] == self.stop_id else [self.stop_id]

    def said(self, output_ids: np.ndarray) -> list[int]:
        """Return the ids of a turn without the id that ends it."""
        ids: list[int] = output_ids.tolist()
        return ids[:-1] if ids and ids[-1] in self.stop_ids else ids

    def sampled_text(self, output_ids: np.ndarray) -> str:
        """Return the text of a turn without the id that ends it."""
        return self._text_of(self.said(output_ids))

    def _text_of(self, ids: Sequence[int]) -> str:
        return clean_text(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def encode_reply(self, text: str) -> list[int]:
        """Return the ids of a scripted turn, including the stop id."""
        return [*self._content(text), self.stop_id]


def without_middle(ids: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Return the head and the tail of `ids`, together at most `room` ids."""
    if len(ids) <= room:
        return list(ids), []
    room = max(0, room)
    head = room // 2
    return list(ids[:head]), list(ids[len(ids) - (room - head) :])
