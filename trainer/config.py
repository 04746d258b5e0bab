"""Settings of a Megatron training role (the policy's; the critic extends them)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Loss(str, Enum):
    """Policy loss; formulas in trainer/losses.py."""

    ppo = "ppo"
    dis = "dis"


class LossNorm(str, Enum):
    """What a loss is averaged over."""

    token = "token"  # all action tokens of the optimizer step
    episode = "episode"  # mean over each episode's action tokens, then over episodes


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class LayoutConfig:
    """How one role is spread over processes; the data-parallel size follows."""

    num_processes: int = 1
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    precision: Precision = Precision.fp32
    max_tokens_per_micro_batch: int = 8192

    def __post_init__(self) -> None:
        if self.num_processes < 1 or self.tensor_parallel < 1:
            raise ValueError(
                f"num_processes={self.num_processes}, tensor_parallel={self.tensor_parallel}: both must be at least 1"
            )
        if self.num_processes % self.tensor_parallel:
            raise ValueError(
                f"num_processes={self.num_processes} is not divisible by tensor_parallel={self.tensor_parallel}: "
                f"the nearest that works is {-(-self.num_processes // self.tensor_parallel) * self.tensor_parallel}"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel=true needs tensor_parallel of at least 2")

    @property
    def data_parallel(self) -> int:
        return self.num_processes // self.tensor_parallel


@dataclass
class OptimizerConfig:
    """AdamW with gradient clipping; the learning rate is warmed up, held, then decayed linearly."""

    lr: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0  # optimizer steps
    decay_steps: int = 0  # optimizer steps at which lr reaches final_lr_ratio * lr; 0: constant
    final_lr_ratio: float = 0.1


@dataclass
class PolicyConfig:
    """The policy's training."""

    layout: LayoutConfig = field(default_factory=LayoutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: Loss = Loss.ppo
    loss_norm: LossNorm = LossNorm.token
    clip_low: float = 0.2
    clip_high: float = 0.28
    num_minibatches: int = 1  # optimizer steps per epoch over the step's batch
    num_epochs: int = 1
    max_logprob_diff: float = 1.0  # engine against trainer, tokens of the current version; above: an error
