"""The task of a recipe, written by the user: it makes rows, environments and players."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from buffer.tasks import TaskRow
from rollout.agents.loop import ToolLoop
from rollout.agents.player import Player
from rollout.config import RolloutConfig
from rollout.environment import Demonstrator, Environment
from rollout.rendering.renderer import Renderer
from rollout.sandbox.interface import Sandbox


class Task(ABC):
    """The prompts, environment and reward of a recipe, constructed with `task.options`."""

    def __init__(self, **options: Any) -> None:
        if options:
            raise ValueError(f"task.options.{next(iter(options))}: {type(self).__name__} takes no options")

    @abstractmethod
    def environment(self, row: TaskRow, sandbox: Sandbox) -> Environment:
        """Return a new environment for one attempt at a row."""

    def player(self, renderer: Renderer, config: RolloutConfig) -> Player:
        """Return the player of a rollout worker's attempts.

        The default is the tool-calling loop with compaction by the policy's summary. Override this method to use
        another compaction or another loop.
        """
        return ToolLoop(renderer, config)

    def make_rows(self, split: str, count: int, seed: int) -> list[TaskRow]:
        """Return `count` generated rows, for tasks without a task file.

        `split` is "train" or "eval"; the two must not share a row.
        """
        raise ValueError(f"{type(self).__name__} makes no rows: set task.{split} to a JSONL file")

    def make_model(self, folder: Path, seed: int) -> None:
        """Write a small untrained Hugging Face folder (model and tokenizer), for tasks that come with a model."""
        raise ValueError(f"{type(self).__name__} has no model of its own: set model.path")

    def demonstrate(self, row: TaskRow, rng: random.Random, progress: float = 1.0) -> Demonstrator:
        """Return a script that plays the row, for recipes of kind sft.

        `progress` is the completed fraction of the run, in [0, 1].
        """
        raise ValueError(f"{type(self).__name__} has no demonstrations")
