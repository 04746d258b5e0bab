"""The complete configuration as plain dataclasses; each folder defines its own section."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from buffer.config import BufferConfig
from critic.config import AdvantageConfig, CriticConfig
from launch.config import ClusterConfig
from machine.settings import derive, setting
from rollout.config import RolloutConfig
from trainer.config import PolicyConfig


class Kind(str, Enum):
    """The kind of training that a recipe runs."""

    ppo = "ppo"  # reinforcement learning with a critic
    sft = "sft"  # supervised warm start


class Resume(str, Enum):
    """What a run does with a folder that holds one already."""

    never = "never"  # is refused
    auto = "auto"  # goes on from its newest checkpoint when there is one
    must = "must"  # the same, and is refused when there is none


@dataclass(frozen=True)
class TaskConfig:
    """Prompts, environment and reward: the section that names user code."""

    target: str = setting("", "The slime.Task, as package.module:Class.")
    train: str = setting("", "JSONL file of the rows to train on; '': the task generates them.")
    eval: str = setting("", "JSONL file of rows that are never trained on; '': the task generates them.")
    options: dict[str, Any] = setting({}, "Arguments of the task's constructor.")


@dataclass(frozen=True)
class ModelConfig:
    """The model and its starting weights."""

    name: str = setting("", "Name of the model's file, used in names and tables.")
    path: str = setting("", "Hugging Face folder, GGUF file or package with one; '': the task's own small model.")
    start: str = setting(
        "", "Recipe that first trains model.path, with a cached result; '': start from model.path itself."
    )
    template: str = setting(
        "chatml", "How messages become tokens: tiny, chatml, hermes, or tokenizer for its own chat template."
    )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the policy on tasks that are never trained on."""

    every: int = setting(10, "Steps between evaluations; 0: only when training ends.", bounds="[0, inf)", unit="steps")
    num_tasks: int = setting(128, "Number of tasks in one evaluation.", bounds="[1, inf)", unit="tasks")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which a stopped run resumes."""

    every: int = setting(10, "Steps between checkpoints; 0: only when training ends.", bounds="[0, inf)", unit="steps")
    keep: int = setting(2, "Number of newest checkpoints that are kept on disk.", bounds="[1, inf)", unit="checkpoints")
    grace_s: float = setting(
        120.0,
        "Time that a run has to finish its step and save its state after SIGTERM or SIGUSR1.",
        bounds="(0, inf)",
        unit="s",
    )


@dataclass(frozen=True)
class TrackingConfig:
    """Logging of metrics and sample episodes."""

    wandb: bool = setting(True, "Log to Weights & Biases, offline unless logged in.")
    project: str = setting("slime", "Project in Weights & Biases.")
    sample_episodes: int = setting(
        8, "Number of episodes that are saved as samples of one step; 0: none.", bounds="[0, inf)", unit="episodes"
    )
    sample_every: int = setting(5, "Steps between samples.", bounds="[1, inf)", unit="steps")


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on a task's demonstrations, as a warm start."""

    batch_sub_traces: int = setting(
        32, "Number of sub-traces in one optimizer step.", bounds="[1, inf)", unit="sub-traces"
    )


@dataclass(frozen=True)
class Config:
    """The configuration of one run."""

    recipe: str = setting("", "Recipe to run; chosen with recipe=NAME.")
    kind: Kind = setting(Kind.ppo, "Kind of training that the recipe runs.")
    run: str = setting("", "Name of the run's folder below runs_dir; '': the recipe's name.")
    runs_dir: str = setting("runs", "Folder of all runs.")
    cache_dir: str = setting(".cache/slime", "Folder of built models, task rows and warm starts.")
    seed: int = setting(0, "Seed of all random numbers.", bounds="[0, 4294967295]")
    steps: int = setting(50, "Number of training steps.", bounds="[1, inf)", unit="steps")
    resume: Resume = setting(
        Resume.auto,
        "Continue from the newest checkpoint of this run: auto if there is one; must refuses a run without one.",
    )
    resume_allow: list[str] = setting(
        [], "Keys whose values may differ from those of the checkpoint, beyond those that always may."
    )
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
        derive(self, run=self.run or self.recipe)


def folder_of(config: Config) -> Path:
    """Return the run's folder."""
    return Path(config.runs_dir) / (config.run or config.recipe)
