"""What a user writes: a task (rows and environments) and an environment (one episode's world)."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer.tasks import TaskRow
from rollout.sandbox.interface import Sandbox


@dataclass(frozen=True)
class Step:
    """Answer of the environment to one action."""

    observation: str  # shown to the agent, unless `done`
    done: bool = False
    reward: float = 0.0  # for this action; `Environment.reward` is added at the end of the episode


class Environment(ABC):
    """The world of one episode."""

    @abstractmethod
    async def start(self) -> str:
        """Prepares the workspace; returns the prompt."""

    @abstractmethod
    async def step(self, action: str) -> Step:
        """Carries out what the agent said. A wrong action is an observation, not an exception."""

    @abstractmethod
    async def reward(self) -> float:
        """Judges the episode, once, after it has ended for whatever reason."""


class Demonstrator(ABC):
    """Plays a row by a script, for a supervised warm start."""

    @abstractmethod
    def action(self) -> str:
        """The next action."""

    @abstractmethod
    def summary(self) -> str:
        """What to carry over a compaction."""


class Task(ABC):
    """Prompts, environment and reward of a recipe, constructed with `task.options`."""

    def __init__(self, **options: Any) -> None:
        if options:
            raise ValueError(f"task.options.{next(iter(options))}: {type(self).__name__} takes no options")

    @abstractmethod
    def environment(self, row: TaskRow, sandbox: Sandbox) -> Environment:
        """A fresh world for one attempt at a row."""

    def make_rows(self, split: str, count: int, seed: int) -> list[TaskRow]:
        """Rows for tasks that make their own. `split` is "train" or "eval"; the two never share a row."""
        raise ValueError(f"{type(self).__name__} makes no rows: set task.{split} to a JSONL file")

    def make_model(self, folder: Path, seed: int) -> None:
        """Writes a small untrained Hugging Face folder (model and tokenizer) for tasks that ship one."""
        raise ValueError(f"{type(self).__name__} has no model of its own: set model.path")

    def demonstrate(self, row: TaskRow, rng: random.Random, progress: float = 1.0) -> Demonstrator:
        """A script that plays the row, for recipes of kind sft. `progress` in [0, 1]: how far the run has come."""
        raise ValueError(f"{type(self).__name__} has no demonstrations")
