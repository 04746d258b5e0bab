"""Settings of the value side."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from trainer.config import LayoutConfig, OptimizerConfig


class Credit(str, Enum):
    """How credit crosses a compaction; formulas in critic/advantages.py."""

    chained = "chained"
    discounted = "discounted"
    independent = "independent"


class Truncation(str, Enum):
    """What follows the last action of a truncated episode."""

    terminal = "terminal"  # nothing: trained with its reward
    bootstrap = "bootstrap"  # the value of the last state


@dataclass
class AdvantageConfig:
    """Generalised advantage estimation over action tokens."""

    credit: Credit = Credit.chained
    gamma: float = 1.0
    lambda_policy: float = 0.99  # ignored when lambda_alpha > 0
    lambda_critic: float = 1.0
    lambda_alpha: float = 0.0  # > 0: lambda_policy = 1 - 1/(alpha * action tokens of the episode)
    truncation: Truncation = Truncation.terminal
    whiten: bool = False  # zero mean, unit variance over the action tokens of the step


@dataclass
class CriticConfig:
    """A critic as large as the policy, started from its weights."""

    layout: LayoutConfig = field(default_factory=LayoutConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    num_minibatches: int = 1
    num_epochs: int = 2  # critic updates per policy update (K)
    warmup_episodes: int = 0  # episodes of the unmoved policy that pre-train the critic
    warmup_epochs: int = 2  # passes over them
    value_clip: float = 0.0  # 0: none
    head_init_std: float = 0.0
