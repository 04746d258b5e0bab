"""What a user writes for a recipe: the task, which makes rows, environments and players."""

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
    """Prompts, environment and reward of a recipe, constructed with `task.options`."""

    def __init__(self, **options: Any) -> None:
        if options:
            raise ValueError(f"task.options.{next(iter(options))}: {type(self).__name__} takes no options")

    @abstractmethod
    def environment(self, row: TaskRow, sandbox: Sandbox) -> Environment:
        """Return a fresh world for one attempt at a row."""

    def player(self, renderer: Renderer, config: RolloutConfig) -> Player:
        """Return who plays the attempts of a rollout worker: the tool-calling loop, compacted by the policy's summary.

        A task that wants another compaction, or another loop, returns its own.
        """
        return ToolLoop(renderer, config)

    def make_rows(self, split: str, count: int, seed: int) -> list[TaskRow]:
        """Return rows for tasks that make their own. `split` is "train" or "eval"; the two never share a row."""
        raise ValueError(f"{type(self).__name__} makes no rows: set task.{split} to a JSONL file")

    def make_model(self, folder: Path, seed: int) -> None:
        """Write a small untrained Hugging Face folder (model and tokenizer) for tasks that ship one."""
        raise ValueError(f"{type(self).__name__} has no model of its own: set model.path")

    def demonstrate(self, row: TaskRow, rng: random.Random, progress: float = 1.0) -> Demonstrator:
        """Return a script that plays the row, for recipes of kind sft. `progress` in [0, 1]: how far the run has
        come.
        """
        raise ValueError(f"{type(self).__name__} has no demonstrations")
