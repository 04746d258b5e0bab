"""Messages to tokens, once; afterwards an episode is token ids only.

What the policy sampled is never decoded and encoded again: a context is put together from the ids of
its parts, so that what is trained is what the engine saw.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from buffer.text import clean_text
from rollout.rendering.templates import find_template


class Renderer:
    """Builds contexts for one tokenizer and template.

    A policy ends its turn with the template's stop id or with any of `end_ids`, its tokenizer's end of sequence among
    them. Whichever it was stays in the context as it was sampled; in what the environment hears, and in a summary that
    is carried over, there is none.
    """

    def __init__(self, tokenizer: Any, template: str, end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._t = find_template(template)
        stop = self._markup(self._t.stop)
        if len(stop) != 1:
            raise ValueError(f"stop text {self._t.stop!r} is {len(stop)} tokens in this tokenizer; it must be one")
        self.stop_id = stop[0]
        end = tokenizer.eos_token_id
        self.stop_ids = frozenset([self.stop_id, *end_ids, *([] if end is None else [end])])
        self.num_closing = min(1, len(self.stop_ids) - 1)  # the most that `closing` takes
        unknown = tokenizer.unk_token_id
        self._reserved = frozenset(tokenizer.all_special_ids) - {unknown}
        self._in_its_place = [] if unknown is None else [unknown]
        self.compact_ids = self._markup(self._t.compact + self._t.reply)

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

    def _wrapped(self, around: tuple[str, str], inner: list[int], after: str = "") -> list[int]:
        return [*self._markup(around[0]), *inner, *self._markup(around[1] + after)]

    def prompt(self, text: str) -> list[int]:
        """Return the task, up to where the policy speaks."""
        return self._wrapped(self._t.user, self._content(text), self._t.reply)

    def observation(self, text: str, max_tokens: int) -> list[int]:
        """Return a tool's answer, up to where the policy speaks; its middle is left out where it would be longer."""
        ids = self._content(text)
        room = max_tokens - len(self._wrapped(self._t.tool, [], self._t.reply))
        if len(ids) > room:
            head = max(0, room) // 2
            ids = ids[:head] + ids[len(ids) - (max(0, room) - head) :]
        return self._wrapped(self._t.tool, ids, self._t.reply)

    def after_compaction(self, task: str, summary_ids: list[int], kept_ids: list[int]) -> list[int]:
        """Return the context that goes on after a summary: task, summary, the kept steps."""
        opening = self._wrapped(self._t.user, self._content(task))
        return [*opening, *self._wrapped(self._t.summary, summary_ids, self._t.reply), *kept_ids]

    def closing(self, output_ids: np.ndarray) -> list[int]:
        """Return what a turn lacks to be closed as the template closes turns: its stop id after another end of turn."""
        return [] if len(output_ids) and output_ids[-1] == self.stop_id else [self.stop_id]

    def said(self, output_ids: np.ndarray) -> list[int]:
        """Return what the policy said: a turn's ids without the one that ends it."""
        ids: list[int] = output_ids.tolist()
        return ids[:-1] if ids and ids[-1] in self.stop_ids else ids

    def sampled_text(self, output_ids: np.ndarray) -> str:
        """Return the same as text."""
        return clean_text(self._tokenizer.decode(self.said(output_ids), clean_up_tokenization_spaces=False))

    def encode_reply(self, text: str) -> list[int]:
        """Return a scripted turn of the policy, stop token included."""
        return [*self._content(text), self.stop_id]
