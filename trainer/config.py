"""Settings of a training role: the policy's, which the critic's extend."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from machine.settings import setting
from trainer.layout import Sizes, refuse_layout
from trainer.megatron.config import MegatronConfig

_ALGORITHMS = Path(__file__).parent / "losses" / "algorithms"


class Loss(str, Enum):
    """Policy loss: the name of a file in trainer/losses/algorithms/, which holds its formula."""

    _ignore_ = "members path"
    members = vars()
    for path in sorted(_ALGORITHMS.glob("[!_]*.py")):
        members[path.stem] = path.stem


class LossNorm(str, Enum):
    """The unit over which a loss is averaged."""

    token = "token"  # all action tokens of the optimizer step
    episode = "episode"  # mean over each episode's action tokens, then over episodes
    sub_trace = "sub_trace"  # mean over each sub-trace's action tokens, then over sub-traces


class Correction(str, Enum):
    """Correction of the difference between the engine's mu and the trainer's pi_old; trainer/losses/correction.py."""

    none = "none"
    tis = "tis"  # weight min(rho, high), rho = pi_old / mu of the token
    icepop = "icepop"  # weight rho inside [low, high], else 0
    mis = "mis"  # weight 0 for episodes with a geometric mean of rho outside [low, high], or a tiny rho


class KL(str, Enum):
    """Estimator of KL(pi_theta || reference) from sampled tokens; trainer/losses/kl.py."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlace(str, Enum):
    """The quantity to which the KL penalty is applied."""

    loss = "loss"  # added to every token's loss
    reward = "reward"  # subtracted from every token's reward, so it is part of the critic's returns


_CORRECTION_BOUNDS = {
    Correction.none: (0.0, float("inf")),
    Correction.tis: (0.0, 2.0),
    Correction.icepop: (0.5, 2.0),
    Correction.mis: (0.99, 1.01),
}


class Precision(str, Enum):
    """Number format of weights in the forward and backward pass; the optimizer's weights are fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(str, Enum):
    """Activations that the backward pass recomputes instead of storing them; docs/gpu.md has the arithmetic."""

    none = "none"
    mlp = "mlp"  # the MLP: about half of the activations, for about a quarter of the forward pass
    layer = "layer"  # every layer from its input: least memory, for the whole forward pass


class Offload(str, Enum):
    """Data of a role kept in host memory while it is not needed; trainer/megatron/offload.py, docs/gpu.md."""

    none = "none"
    optimizer = "optimizer"  # fp32 weights and Adam's moments, except during optimizer steps
    role = "role"  # also weights and gradients while the role is idle: for roles that share a GPU


@dataclass(frozen=True)
class LayoutConfig:
    """The layout of one role over processes; every training engine has these settings."""

    num_processes: int = setting(
        1, "Processes of the role; each has its own GPU, if there are GPUs.", bounds="[1, inf)", unit="processes"
    )
    precision: Precision = setting(Precision.fp32, "Number format of the forward and backward pass.")
    max_tokens_per_micro_batch: int = setting(
        8192, "Tokens of one forward and backward pass of a process.", bounds="[1, inf)", unit="tokens"
    )
    recompute: Recompute = setting(Recompute.none, "Activations that the backward pass computes again: less memory.")
    offload: Offload = setting(Offload.none, "Data kept in host memory while the role does not need it.")

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(
                f"num_processes={self.num_processes} must be at least 1: the nearest that works is num_processes=1"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW with gradient clipping; the learning rate is warmed up, held, then decayed linearly."""

    lr: float = setting(1e-6, "Learning rate after its warm-up.", bounds="(0, inf)")
    beta1: float = setting(0.9, "Decay of the mean of gradients.", bounds="[0, 1)")
    beta2: float = setting(0.95, "Decay of the mean of squared gradients.", bounds="[0, 1)")
    eps: float = setting(1e-8, "Added to the root of the mean of squared gradients.", bounds="(0, inf)")
    weight_decay: float = setting(0.0, "Decoupled weight decay.", bounds="[0, inf)")
    max_grad_norm: float = setting(1.0, "Gradients with a larger norm are scaled down to it.", bounds="(0, inf)")
    warmup_steps: int = setting(
        0, "Steps in which the rate rises linearly from 0.", bounds="[0, inf)", unit="optimizer steps"
    )
    decay_steps: int = setting(
        0, "Step at which the rate reaches final_lr_ratio * lr; 0: constant.", bounds="[0, inf)", unit="optimizer steps"
    )
    final_lr_ratio: float = setting(0.1, "Fraction of lr that remains after decay_steps.", bounds="[0, 1]")


@dataclass(frozen=True)
class TrainingEngineConfig:
    """Settings of a role's training engine."""

    options: dict[str, Any] = setting(
        {}, "Any other field of Megatron's TransformerConfig, e.g. {attention_softmax_in_fp32: true}."
    )


@dataclass(frozen=True)
class RoleConfig:
    """The layout of a training role: its processes, and Megatron's division of the model and the tokens among them."""

    _role = "role"  # its name in messages

    layout: LayoutConfig = field(default_factory=LayoutConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

    def __post_init__(self) -> None:
        try:
            refuse_layout(self.sizes())
        except ValueError as error:
            raise ValueError(f"{self._role}.megatron: {error}") from error

    def sizes(self) -> Sizes:
        """Return the numbers that the checks of layouts take."""
        return Sizes.of(self.layout.num_processes, self.megatron)

    @property
    def row_size(self) -> int:
        """Return the number of processes that share one data-parallel row."""
        return self.sizes().row_size

    @property
    def data_parallel(self) -> int:
        return self.layout.num_processes // self.row_size


@dataclass(frozen=True)
class PolicyConfig(RoleConfig):
    """Settings of the policy's training."""

    _role = "policy"

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: Loss = setting(Loss("ppo"), "Policy loss.")
    loss_norm: LossNorm = setting(LossNorm.token, "Unit over which the loss is averaged.")
    clip_low: float = setting(0.2, "The loss's window begins at a ratio of 1 - clip_low.", bounds="(0, 1]")
    clip_high: float = setting(0.28, "The loss's window ends at a ratio of 1 + clip_high.", bounds="(0, inf)")
    dual_clip: float = setting(
        0.0, "Bound of ppo's ratio where the advantage is negative, e.g. 3; 0: none.", bounds="[0, inf)"
    )
    correction: Correction = setting(Correction.none, "Correction for the difference between engine and trainer.")
    correction_bounds: list[float] = setting([], "Lowest and highest ratio of the correction; []: its defaults.")
    kl_coef: float = setting(
        0.0, "Weight of the KL to the starting model; 0: none, and no reference is loaded.", bounds="[0, inf)"
    )
    kl: KL = setting(KL.k3, "Estimator of the KL to the starting model.")
    kl_in: KLPlace = setting(
        KLPlace.loss, "Whether the KL to the starting model is added to the loss or subtracted from the reward."
    )
    entropy_coef: float = setting(
        0.0, "Weight of a bonus for the entropy of the next token's distribution.", bounds="[0, inf)"
    )
    nll_coef: float = setting(
        0.0, "Weight of the negative log-likelihood of episodes with positive reward.", bounds="[0, inf)"
    )
    train_summaries: bool = setting(True, "Include the tokens of summaries in the policy's loss.")
    num_minibatches: int = setting(
        1, "Optimizer steps of one pass over a step's batch.", bounds="[1, inf)", unit="optimizer steps"
    )
    num_epochs: int = setting(1, "Passes over a step's batch.", bounds="[1, inf)", unit="passes")
    max_logprob_diff: float = setting(
        1.0,
        "The run stops when engine and trainer differ by more on tokens of the current weights.",
        bounds="(0, inf)",
        unit="nats",
    )
    engine: TrainingEngineConfig = field(default_factory=TrainingEngineConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction_bounds and not (
            len(self.correction_bounds) == 2 and 0 <= self.correction_bounds[0] < self.correction_bounds[1]
        ):
            raise ValueError(
                f"policy.correction_bounds={self.correction_bounds}: must be [low, high] with 0 <= low < high, "
                "or [] for the correction's defaults"
            )
        if self.loss.value == "gspo" and self.megatron.context_parallel > 1:
            raise ValueError(
                f"policy.loss=gspo takes means over whole sequences, but policy.megatron.context_parallel="
                f"{self.megatron.context_parallel} cuts them: use context_parallel=1, or another loss"
            )

    @property
    def correction_window(self) -> tuple[float, float]:
        """Return the low and high bound of the correction's ratio."""
        low, high = self.correction_bounds or _CORRECTION_BOUNDS[self.correction]
        return low, high
