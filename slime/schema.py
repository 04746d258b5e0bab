"""The whole configuration as plain dataclasses; each folder owns its own part."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from buffer.config import BufferConfig
from critic.config import AdvantageConfig, CriticConfig
from launch.config import ClusterConfig
from rollout.config import RolloutConfig
from trainer.config import PolicyConfig


class Kind(str, Enum):
    """What a recipe does."""

    ppo = "ppo"  # reinforcement learning with a critic
    sft = "sft"  # supervised warm start


@dataclass
class TaskConfig:
    """Prompts, environment and reward: the one place where a recipe names user code."""

    target: str = ""  # "package.module:Class" of a slime.Task
    train: str = ""  # JSONL rows; "": the task makes its own
    eval: str = ""  # JSONL rows that are never trained on; "": the task makes its own
    options: dict[str, Any] = field(default_factory=dict)  # handed to the task's constructor


@dataclass
class ModelConfig:
    """Which model, and what to start from."""

    name: str = ""
    path: str = ""  # Hugging Face folder; "": the task's tiny model, built on the spot
    start: str = ""  # recipe that trains `path` first; its result, cached, is then the start. "": `path` itself is
    template: str = "chatml"  # how messages become tokens: rollout/rendering.py


@dataclass
class EvalConfig:
    """Measuring the policy on tasks that are never trained on."""

    every: int = 10  # steps; 0: only when training ends
    num_tasks: int = 128


@dataclass
class CheckpointConfig:
    """What is saved, so that a stopped run loses nothing."""

    every: int = 10  # steps; 0: only when training ends
    keep: int = 2  # newest checkpoints that stay on disk


@dataclass
class TrackingConfig:
    """What is written down for people to look at."""

    wandb: bool = True  # offline unless logged in
    project: str = "slime"
    sample_episodes: int = 8  # episodes of a step kept for people to read
    sample_every: int = 5  # steps between samples


@dataclass
class SftConfig:
    """Supervised warm start on a task's demonstrations."""

    batch_sub_traces: int = 32  # per optimizer step


@dataclass
class Config:
    """One run."""

    recipe: str = ""
    kind: Kind = Kind.ppo
    run: str = ""  # name of the folder below runs/; "": the recipe's name
    runs_dir: str = "runs"
    cache_dir: str = ".cache/slime"  # built models, task rows, warm starts
    seed: int = 0
    steps: int = 50
    resume: bool = True  # go on from the newest checkpoint of this run when there is one
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        self.run = self.run or self.recipe


def folder_of(config: Config) -> Path:
    """The run's folder."""
    return Path(config.runs_dir) / (config.run or config.recipe)
