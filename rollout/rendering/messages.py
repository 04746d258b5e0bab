"""What a context is made of before it is token ids: messages, and the tools that the policy may call.

A message is what chat templates read: `role` ("system", "user", "assistant", "tool"), `content`, and where a template
knows them `reasoning_content`, `tool_calls`, `tool_call_id`, `name`. A tool is a JSON schema.
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
    """What an episode begins with: one user message, or a conversation with a system message, tools and examples."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    @classmethod
    def of(cls, text: str) -> Prompt:
        """Return the prompt of one user message."""
        return cls((message("user", text),))


@dataclass(frozen=True)
class Context:
    """What is before the policy: messages, and the ids that stand for them.

    The ids end where the policy goes on, or with its answer. What it sampled is in them as it was sampled, never text
    that was tokenized again, unless the template has rewritten the conversation since.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    ids: tuple[int, ...]
    num_known: int = 0  # ids up to the end of the policy's last answer: those that an engine has seen or sampled

    def answered(self, output_ids: list[int], text: str) -> Context:
        """Return the context with the policy's answer: the ids that it sampled, which read as `text`."""
        ids = (*self.ids, *output_ids)
        return Context((*self.messages, message("assistant", text)), self.tools, ids, len(ids))


@dataclass(frozen=True)
class Exchange:
    """One action of the policy with the environment's answer to it."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]  # what stands for them in a context, up to where the policy goes on
