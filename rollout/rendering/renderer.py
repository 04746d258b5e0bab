"""Messages to tokens, once; afterwards an episode is token ids only.

What the policy sampled is never decoded and encoded again: a context is put together from the ids of
its parts, so that what is trained is what the engine saw.
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

    A policy ends its turn with the template's stop id or with any of `end_ids`, its tokenizer's end of sequence among
    them. Whichever it was stays in the context as it was sampled; in what the environment hears, and in a summary that
    is carried over, there is none.
    """

    num_request: int  # tokens that ask for a summary
    num_answer: int  # tokens of an environment's empty answer, that which closes the policy's turn included

    def __init__(self, tokenizer: Any, stop_id: int, end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.stop_id = stop_id
        end = tokenizer.eos_token_id
        self.stop_ids = frozenset([self.stop_id, *end_ids, *([] if end is None else [end])])
        self.num_closing = min(1, len(self.stop_ids) - 1)  # the most that `closing` takes
        unknown = tokenizer.unk_token_id
        self._reserved = frozenset(tokenizer.all_special_ids) - {unknown}
        self._in_its_place = [] if unknown is None else [unknown]

    @abstractmethod
    def start(self, prompt: Prompt) -> Context:
        """Return the context of a prompt, up to where the policy goes on. ValueError: the template can't render it."""

    @abstractmethod
    def observe(self, context: Context, text: str, max_tokens: int) -> Context:
        """Return the context with an environment's answer to the policy, up to where the policy goes on.

        The answer loses its middle where the context would be longer than `max_tokens`.
        """

    @abstractmethod
    def ask_summary(self, context: Context) -> Context:
        """Return the context with the request for a summary, where the policy was to go on."""

    @abstractmethod
    def resume(self, prompt: Prompt, summary_ids: Sequence[int] | None, exchanges: Sequence[Exchange]) -> Context:
        """Return the context after a compaction: prompt, summary (None: there is none), exchanges."""

    def prompt(self, text: str) -> list[int]:
        """Return the task, up to where the policy speaks."""
        return list(self.start(Prompt.of(text)).ids)

    def _markup(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _content(self, text: str) -> list[int]:
        """Text from outside: what looks like markup in it stays plain text.

        Where a vocabulary has markup that is also an ordinary character, that character becomes <unk>.
        """
        if not text:
            return []
        ids: list[int] = self._tokenizer.encode(clean_text(text), add_special_tokens=False, split_special_tokens=True)
        if self._reserved.isdisjoint(ids):
            return ids
        return [kept for i in ids for kept in (self._in_its_place if i in self._reserved else [i])]

    def closing(self, output_ids: Sequence[int] | np.ndarray) -> list[int]:
        """Return what a turn lacks to be closed as the template closes turns: its stop id after another end of turn."""
        return [] if len(output_ids) and output_ids[-1] == self.stop_id else [self.stop_id]

    def said(self, output_ids: np.ndarray) -> list[int]:
        """Return what the policy said: a turn's ids without the one that ends it."""
        ids: list[int] = output_ids.tolist()
        return ids[:-1] if ids and ids[-1] in self.stop_ids else ids

    def sampled_text(self, output_ids: np.ndarray) -> str:
        """Return the same as text."""
        return self._text_of(self.said(output_ids))

    def _text_of(self, ids: Sequence[int]) -> str:
        return clean_text(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def encode_reply(self, text: str) -> list[int]:
        """Return a scripted turn of the policy, stop token included."""
        return [*self._content(text), self.stop_id]


def without_middle(ids: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Return the head and the tail of ids, together at most `room` of them."""
    if len(ids) <= room:
        return list(ids), []
    room = max(0, room)
    head = room // 2
    return list(ids[:head]), list(ids[len(ids) - (room - head) :])
