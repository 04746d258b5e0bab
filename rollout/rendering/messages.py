"""The content of a context before tokenization: messages, and the tools that the policy may call.

A message has the keys that chat templates read: `role` ("system", "user", "assistant", "tool"), `content`, and, if the
template supports them, `reasoning_content`, `tool_calls`, `tool_call_id`, `name`. A tool is a JSON schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


def message(role: str, text: str) -> Message:
    """Return a message of plain text."""
    return {"role": role, "content": text}


@dataclass(frozen=True)
class Prompt:
    """The start of an episode: one user message, or a conversation with a system message, tools and examples."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    @classmethod
    def of(cls, text: str) -> Prompt:
        """Return the prompt of one user message."""
        return cls((message("user", text),))


@dataclass(frozen=True)
class Context:
    """The input of the policy: messages, and their token ids.

    The ids end where the policy's turn begins, or with the policy's answer. They contain sampled ids as they were
    sampled, never tokenized again, unless the template has rewritten the conversation since.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    ids: tuple[int, ...]
    num_known: int = 0  # number of ids up to the end of the policy's last answer, which an engine saw or sampled

    def answered(self, output_ids: list[int], text: str) -> Context:
        """Return the context with the policy's answer: the sampled ids and their text."""
        ids = (*self.ids, *output_ids)
        return Context((*self.messages, message("assistant", text)), self.tools, ids, len(ids))


@dataclass(frozen=True)
class Exchange:
    """One action of the policy and the environment's answer to it."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]  # their ids in a context, up to where the policy's next turn begins
