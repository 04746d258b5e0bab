"""The environment of an episode and a script that plays it, both written by the user."""

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
    """The environment's answer to one action."""

    observation: str  # shown to the agent unless `done`
    done: bool = False
    reward: float = 0.0  # for this action; `Environment.reward` is added at the end of the episode


class Environment(ABC):
    """The environment of one episode."""

    @abstractmethod
    async def start(self) -> str | Prompt:
        """Prepare the workspace and return the prompt: text, or a conversation with tools."""

    @abstractmethod
    async def step(self, action: str) -> Step:
        """Carry out the agent's action. Answer an invalid action with an observation, not with an exception."""

    @abstractmethod
    async def reward(self) -> float:
        """Return the reward of the episode. Called once, after the episode has ended for any reason."""


class Demonstrator(ABC):
    """A script that plays one row, for a supervised warm start."""

    @abstractmethod
    def action(self) -> str:
        """Return the next action."""

    @abstractmethod
    def summary(self) -> str:
        """Return the summary that a compaction carries over."""


# Checks of the values that user code returns. `what` is the subject of the ValueError's message.


async def awaited(answer: Awaitable[Any], what: str) -> Any:
    """Return the result of an `async def`. ValueError: `answer` is not awaitable."""
    if not inspect.isawaitable(answer):
        raise ValueError(f"{what} is {_shown(answer)}: the method must be an `async def`")
    return await answer


def require_kind(value: object, kind: type, what: str) -> None:
    """Require an instance of one of slime's classes."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {_shown(value)}: it must be a slime.{kind.__name__}")


def as_text(value: object, what: str) -> str:
    """Return text that every tokenizer accepts: see `clean_text`."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_shown(value)}: it must be text")
    return clean_text(str(value))


def as_prompt(value: object, what: str) -> Prompt:
    """Return a prompt whose text every tokenizer accepts; plain text becomes one user message."""
    if not isinstance(value, Prompt):
        return Prompt.of(as_text(value, what))
    for one in value.messages:
        if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
            raise ValueError(f"{what}: {_shown(one)} is not a message: it must be a mapping with role and content")
    if not value.messages or value.messages[-1]["role"] == "assistant":
        raise ValueError(f"{what} must end with a message to the policy: it has {len(value.messages)} messages")
    return value


def as_reward(value: object, what: str) -> float:
    """Return the reward as a float. Any real number or bool that is finite in float32 is valid."""
    if isinstance(value, numbers.Real | np.bool_):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if abs(number) <= _LARGEST:
            return number
    raise ValueError(f"{what} is {_shown(value)}: it must be a finite number")


def as_step(step: Any, what: str) -> Step:
    """Return a valid Step: its observation is text (None is allowed if `done`) and its `done` is a bool."""
    require_kind(step, Step, f"{what}: the step")
    if not isinstance(step.done, bool | np.bool_):
        raise ValueError(f"{what}: done is {_shown(step.done)}: it must be True or False")
    observation = "" if step.done and step.observation is None else step.observation
    text, reward = as_text(observation, f"{what}: observation"), as_reward(step.reward, f"{what}: reward")
    return Step(text, bool(step.done), reward)


def _shown(value: object) -> str:
    """Return the value as one short line."""
    return " ".join(reprlib.repr(value).split())
