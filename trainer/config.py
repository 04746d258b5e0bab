"""Settings of a Megatron training role (the policy's; the critic extends them)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from trainer.layout import Sizes, refuse_layout


class Loss(str, Enum):
    """Policy loss; formulas in trainer/losses/."""

    ppo = "ppo"
    dis = "dis"
    cispo = "cispo"
    gspo = "gspo"
    decoupled = "decoupled"


class LossNorm(str, Enum):
    """What a loss is averaged over."""

    token = "token"  # all action tokens of the optimizer step
    episode = "episode"  # mean over each episode's action tokens, then over episodes
    sub_trace = "sub_trace"  # mean over each sub-trace's action tokens, then over sub-traces


class Correction(str, Enum):
    """What makes up for the engine's mu differing from the trainer's pi_old; trainer/losses/correction.py."""

    none = "none"
    tis = "tis"  # weight min(rho, high), rho = pi_old / mu of the token
    icepop = "icepop"  # weight rho inside [low, high], else 0
    mis = "mis"  # weight 0 for episodes whose geometric mean of rho leaves [low, high], or with a token of tiny rho


class KL(str, Enum):
    """Estimator of KL(pi_theta || reference) from sampled tokens; trainer/losses/kl.py."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlace(str, Enum):
    """Where the KL penalty enters."""

    loss = "loss"  # added to every token's loss
    reward = "reward"  # subtracted from every token's reward: the critic's returns contain it, too


_CORRECTION_BOUNDS = {
    Correction.none: (0.0, float("inf")),
    Correction.tis: (0.0, 2.0),
    Correction.icepop: (0.5, 2.0),
    Correction.mis: (0.99, 1.01),
}


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(str, Enum):
    """What the backward pass computes again instead of keeping it; the arithmetic of docs/gpu.md."""

    none = "none"
    mlp = "mlp"  # the MLP: about half of the activations, for about a quarter of the forward pass
    layer = "layer"  # every layer from its input: least memory, for the whole forward pass


class Offload(str, Enum):
    """What of a role lies in the host's memory while it is not needed; trainer/offload.py, docs/gpu.md."""

    none = "none"
    optimizer = "optimizer"  # fp32 weights and Adam's moments, but in optimizer steps
    role = "role"  # these, and weights and gradients while the role has no work: for roles that share a GPU


@dataclass
class LayoutConfig:
    """How one role is spread over processes; the data-parallel size follows.

    Tensor, pipeline and context parallelism multiply to the processes that hold one data-parallel row. Experts are
    spread over the processes of a pipeline stage: `expert_parallel` divides num_processes / pipeline_parallel.
    """

    num_processes: int = 1
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    pipeline_parallel: int = 1
    virtual_stages: int = 1  # parts of the model that each pipeline process holds, not next to each other
    context_parallel: int = 1  # processes that share the tokens of a sequence
    expert_parallel: int = 1  # 1: the experts are split like other layers are by tensor_parallel
    precision: Precision = Precision.fp32
    max_tokens_per_micro_batch: int = 8192
    recompute: Recompute = Recompute.none
    offload: Offload = Offload.none

    def __post_init__(self) -> None:
        refuse_layout(self)

    @property
    def row_size(self) -> int:
        """Processes that work on the same sequences."""
        return Sizes.of(self).row_size

    @property
    def data_parallel(self) -> int:
        return self.num_processes // self.row_size

    @property
    def expert_tensor_parallel(self) -> int:
        """Processes that share one expert's tensors."""
        return self.tensor_parallel if self.expert_parallel == 1 else 1


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
    dual_clip: float = 0.0  # ppo: bound of the ratio where the advantage is negative, e.g. 3; 0: none
    correction: Correction = Correction.none
    correction_bounds: list[float] = field(default_factory=list)  # low, high; []: the correction's usual ones
    kl_coef: float = 0.0  # of KL to the starting model; 0: none, and no reference model is loaded
    kl: KL = KL.k3
    kl_in: KLPlace = KLPlace.loss
    entropy_coef: float = 0.0  # bonus for the entropy of the next token's distribution
    nll_coef: float = 0.0  # of the negative log-likelihood of episodes with positive reward
    train_summaries: bool = True  # False: summary tokens are no part of the policy's loss
    num_minibatches: int = 1  # optimizer steps per epoch over the step's batch
    num_epochs: int = 1
    max_logprob_diff: float = 1.0  # engine against trainer, tokens of the current version; above: an error

    def __post_init__(self) -> None:
        if self.correction_bounds and not (
            len(self.correction_bounds) == 2 and 0 <= self.correction_bounds[0] < self.correction_bounds[1]
        ):
            raise ValueError(
                f"policy.correction_bounds={self.correction_bounds}: must be [low, high] with 0 <= low < high, "
                "or [] for the correction's usual ones"
            )
        if self.loss is Loss.gspo and self.layout.context_parallel > 1:
            raise ValueError(
                f"policy.loss=gspo takes means over whole sequences, policy.layout.context_parallel="
                f"{self.layout.context_parallel} cuts them: use context_parallel=1, or another loss"
            )

    @property
    def correction_window(self) -> tuple[float, float]:
        """Low and high bound of the correction's ratio."""
        low, high = self.correction_bounds or _CORRECTION_BOUNDS[self.correction]
        return low, high
