"""What a user writes for one episode: its environment, and a script that plays it."""

from __future__ import annotations

import inspect
import math
import numbers
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from buffer.text import clean_text
from rollout.rendering.messages import Prompt

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Step:
    """Answer of the environment to one action."""

    observation: str  # shown to the agent, unless `done`
    done: bool = False
    reward: float = 0.0  # for this action; `Environment.reward` is added at the end of the episode


class Environment(ABC):
    """The world of one episode."""

    @abstractmethod
    async def start(self) -> str | Prompt:
        """Prepare the workspace; return the prompt: text, or a conversation with tools."""

    @abstractmethod
    async def step(self, action: str) -> Step:
        """Carry out what the agent said. A wrong action is an observation, not an exception."""

    @abstractmethod
    async def reward(self) -> float:
        """Judge the episode, once, after it has ended for whatever reason."""


class Demonstrator(ABC):
    """Plays a row by a script, for a supervised warm start."""

    @abstractmethod
    def action(self) -> str:
        """Return the next action."""

    @abstractmethod
    def summary(self) -> str:
        """Return what to carry over a compaction."""


# What user code answers, checked where it comes in. `what` begins the sentence of the ValueError.


async def awaited(answer: Awaitable[Any], what: str) -> Any:
    """Return the answer of an `async def`."""
    if not inspect.isawaitable(answer):
        raise ValueError(f"{what} is {_shown(answer)}: the method must be an `async def`")
    return await answer


def require_kind(value: object, kind: type, what: str) -> None:
    """Require an object of a class of ours."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {_shown(value)}: it must be a slime.{kind.__name__}")


def as_text(value: object, what: str) -> str:
    """Return the text that every tokenizer takes: see `clean_text`."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_shown(value)}: it must be text")
    return clean_text(str(value))


def as_prompt(value: object, what: str) -> Prompt:
    """Return a prompt whose text every tokenizer takes; text alone is one user message."""
    if not isinstance(value, Prompt):
        return Prompt.of(as_text(value, what))
    for one in value.messages:
        if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
            raise ValueError(f"{what}: {_shown(one)} is no message: it must be a mapping with role and content")
    if not value.messages or value.messages[-1]["role"] == "assistant":
        raise ValueError(f"{what} must end with a message to the policy: it has {len(value.messages)} messages")
    return value


def as_reward(value: object, what: str) -> float:
    """Return a finite number of any kind, a bool too, that float32 can hold."""
    if isinstance(value, numbers.Real | np.bool_):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if abs(number) <= _LARGEST:
            return number
    raise ValueError(f"{what} is {_shown(value)}: it must be a finite number")


def as_step(step: Any, what: str) -> Step:
    """Return a Step whose observation is text, that may be None at the end, and whose `done` is a bool."""
    require_kind(step, Step, f"{what}: the step")
    if not isinstance(step.done, bool | np.bool_):
        raise ValueError(f"{what}: done is {_shown(step.done)}: it must be True or False")
    observation = "" if step.done and step.observation is None else step.observation
    text, reward = as_text(observation, f"{what}: observation"), as_reward(step.reward, f"{what}: reward")
    return Step(text, bool(step.done), reward)


def _shown(value: object) -> str:
    """A value on one short line."""
    return " ".join(reprlib.repr(value).split())
