"""Settings of the critic and of advantages."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from machine.settings import setting
from trainer.config import OptimizerConfig, RoleConfig, TrainingEngineConfig


class Credit(str, Enum):
    """How credit crosses a compaction; formulas in critic/advantages.py."""

    chained = "chained"
    discounted = "discounted"
    independent = "independent"


class Baseline(str, Enum):
    """The baseline of a reward. All except `critic` give every token of an episode the same advantage."""

    critic = "critic"  # generalized advantage estimation: critic/advantages.py
    grpo = "grpo"  # group mean and standard deviation: critic/episode_baselines.py
    grpo_no_std = "grpo_no_std"  # group mean
    rloo = "rloo"  # mean of the others of the group
    reinforce_pp = "reinforce_pp"  # mean and standard deviation of the step


class LambdaLength(str, Enum):
    """The unit whose action tokens the length-adaptive lambda counts."""

    episode = "episode"
    sub_trace = "sub_trace"


class Truncation(str, Enum):
    """The treatment of the state after the last action of a truncated episode."""

    terminal = "terminal"  # its value is 0: the episode is trained with its reward
    bootstrap = "bootstrap"  # its value is the critic's


@dataclass(frozen=True)
class AdvantageConfig:
    """Settings of the advantages of action tokens. Without a critic only `baseline` and `whiten` apply."""

    baseline: Baseline = setting(Baseline.critic, "What a reward is compared with.")
    credit: Credit = setting(Credit.chained, "How credit crosses a compaction.")
    gamma: float = setting(1.0, "Discount of one action token.", bounds="[0, 1]")
    lambda_policy: float = setting(
        0.99, "Lambda of the policy's advantages; 1: unbiased and noisy, lower: trust the critic more.", bounds="[0, 1]"
    )
    lambda_critic: float = setting(
        1.0, "Lambda of the critic's returns; 1: the critic learns returns that were earned.", bounds="[0, 1]"
    )
    lambda_alpha: float = setting(
        0.0,
        "Above 0, lambda_policy is 1 - 1/(lambda_alpha * l), l the action tokens that lambda_length counts; 0: fixed.",
        bounds="[0, inf)",
    )
    lambda_length: LambdaLength = setting(LambdaLength.episode, "Whose action tokens lambda_alpha counts.")
    truncation: Truncation = setting(Truncation.terminal, "What follows the last action of a truncated episode.")
    whiten: bool = setting(False, "Give advantages mean 0 and variance 1 over the action tokens of the step.")


@dataclass(frozen=True)
class CriticConfig(RoleConfig):
    """Settings of a critic as large as the policy, initialized from the policy's weights."""

    _role = "critic"

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    num_minibatches: int = setting(
        1, "Optimizer steps of one pass over a step's batch.", bounds="[1, inf)", unit="optimizer steps"
    )
    num_epochs: int = setting(
        2, "Passes of the critic over a step's batch, for one update of the policy.", bounds="[1, inf)", unit="passes"
    )
    warmup_episodes: int = setting(
        0,
        "Episodes of the untrained policy that pre-train the critic before the first step; 0: none.",
        bounds="[0, inf)",
        unit="episodes",
    )
    warmup_epochs: int = setting(2, "Passes over the episodes of pre-training.", bounds="[1, inf)", unit="passes")
    warmup_explained_variance: float = setting(
        1.0, "Pre-training ends early when unseen episodes are explained this well; 1: never.", bounds="(0, 1]"
    )
    value_clip: float = setting(
        0.0, "How far a value may move from the old one before its loss is clipped; 0: no clip.", bounds="[0, inf)"
    )
    value_range: list[float] = setting([], "Smallest and largest value that the head can give; []: unbounded.")
    head_init_std: float = setting(
        0.0, "Standard deviation of the value head's first weights; 0: every value starts at 0.", bounds="[0, inf)"
    )
    freeze: list[str] = setting([], "Patterns of parameters that are never trained, e.g. ['*self_attention*'].")
    engine: TrainingEngineConfig = field(default_factory=TrainingEngineConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_range and not (len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]):
            raise ValueError(
                f"critic.value_range={self.value_range}: must be [low, high] with low < high, or [] for no bounds"
            )
