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


class Baseline(str, Enum):
    """What a reward is compared with. All but `critic` give every token of an episode the same advantage."""

    critic = "critic"  # generalised advantage estimation: critic/advantages.py
    grpo = "grpo"  # group mean and standard deviation: critic/episode_baselines.py
    grpo_no_std = "grpo_no_std"  # group mean
    rloo = "rloo"  # mean of the others of the group
    reinforce_pp = "reinforce_pp"  # mean and standard deviation of the step


class LambdaLength(str, Enum):
    """Whose action tokens the length-adaptive lambda counts."""

    episode = "episode"
    sub_trace = "sub_trace"


class Truncation(str, Enum):
    """What follows the last action of a truncated episode."""

    terminal = "terminal"  # nothing: trained with its reward
    bootstrap = "bootstrap"  # the value of the last state


@dataclass
class AdvantageConfig:
    """How rewards become advantages of action tokens. Without a critic only `baseline` and `whiten` matter."""

    baseline: Baseline = Baseline.critic
    credit: Credit = Credit.chained
    gamma: float = 1.0
    lambda_policy: float = 0.99  # ignored when lambda_alpha > 0
    lambda_critic: float = 1.0
    lambda_alpha: float = 0.0  # > 0: lambda_policy = 1 - 1/(alpha * l), l the action tokens of ...
    lambda_length: LambdaLength = LambdaLength.episode  # ... the episode or the sub-trace
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
    warmup_explained_variance: float = 1.0  # pre-training ends early when unseen episodes are explained this well
    value_clip: float = 0.0  # 0: none
    value_range: list[float] = field(default_factory=list)  # smallest, largest value the head can say; []: unbounded
    head_init_std: float = 0.0
    freeze: list[str] = field(
        default_factory=list
    )  # patterns of parameters that never train, e.g. ['*self_attention*']

    def __post_init__(self) -> None:
        if self.value_range and not (len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]):
            raise ValueError(
                f"critic.value_range={self.value_range}: must be [low, high] with low < high, or [] for no bounds"
            )
