"""The protocol of training engines: one process's shard of a model, without reinforcement learning and without Ray.

    worker (trainer/policy.py, critic/worker.py)     chooses the call, the loss and the tokens
      |  micro-batches, a loss of the model's output
    engine (trainer/megatron/, trainer/reference/)   forward, backward, optimizer, weights, checkpoints, memory

Every process of a role has one engine. All of them receive the same calls in the same order, because calls may be
collective.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch

from trainer.batching import MicroBatch
from trainer.config import LayoutConfig, OptimizerConfig
from trainer.megatron.config import MegatronConfig
from trainer.models.shape import ModelShape

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class EngineSettings:
    """Arguments that an engine is constructed from."""

    rank: int
    layout: LayoutConfig
    megatron: MegatronConfig  # another engine refuses all but its defaults
    optimizer: OptimizerConfig
    model_folder: str
    seed: int
    threads: int
    timeout_s: float
    frozen: bool = False  # forward passes only: no gradients, no optimizer
    options: Mapping[str, Any] = field(default_factory=dict)  # additional settings of the engine's library


@dataclass(frozen=True)
class ScalarHead:
    """A head with one fp32 output per token that replaces the vocabulary projection: activation(w h + b).

    `init_std`: standard deviation of w, which is drawn from the engine's seed; b starts at 0.
    """

    init_std: float
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class RankShare:
    """The share of a role's batches that one rank computes, and the numbers that must divide their sizes."""

    row: int = 0  # data-parallel rank: the row of the grid that the rank computes
    length_multiples: tuple[int, int] = (1, 1)  # of the length of each sequence, and of a whole micro-batch
    context: tuple[int, int] = (1, 0)  # number of processes that share the tokens of a sequence, and this one's rank
    batch_multiple: int = 1  # of the number of micro-batches; empty ones are added


class SummedLoss(NamedTuple):
    """A loss over the tokens of one micro-batch."""

    total: torch.Tensor  # differentiable sum; the engine divides by the optimizer step's action tokens
    sums: dict[str, torch.Tensor]  # for metrics, summed over micro-batches and ranks
    maxima: dict[str, torch.Tensor]


# Model output (log-probabilities and entropies [2, P], or values [1, P]) and its micro-batch -> loss.
LossFunction = Callable[[torch.Tensor, MicroBatch], SummedLoss]


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step."""

    grad_norm: float  # of all ranks' gradients together, before clipping
    lr: float
    losses: tuple[SummedLoss, ...]  # of each micro-batch; empty except on one process for each slice of the tokens


class Memory(Enum):
    """A kind of device memory that an engine may move to host memory while it is not needed."""

    weights = "weights"  # parameters and buffers of the model
    gradients = "gradients"  # of all parameters, in fp32
    state = "state"  # fp32 weights and Adam's moments


class Saving(Protocol):
    """One rank's share of a checkpoint that is being written to disk."""

    def result(self) -> bytes | None:
        """Return this rank's input of `finish`; None while it is being written. OSError: it could not be written."""

    def finish(self, of_ranks: Sequence[bytes]) -> None:
        """Complete the checkpoint, on rank 0, from the results of all ranks in rank order. OSError: it can't."""


class Engine(Protocol):
    """One process's shard of a model. `start` must have returned on all ranks before any other call.

    Memory that a call needs must be on the device (`present`), except that `update` loads the optimizer's state itself.
    """

    shape: ModelShape  # of the whole model
    share: RankShare
    device: torch.device

    def start(self, master: str, port: int) -> None:
        """Join the role's process group at rank 0's address, build the shard, read its weights.

        ValueError: the model's folder is bad, or the layout does not fit the model.
        """

    def forward(self, batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, torch.Tensor]]:
        """Compute each micro-batch's log-probabilities, or values with a scalar head, [A], without gradients.

        Returns them on one process of every data-parallel row, and nothing on the others.
        """

    def update(self, steps: Iterable[Sequence[MicroBatch]], loss: LossFunction) -> list[StepResult]:
        """Take one optimizer step for each list of micro-batches. RuntimeError: a gradient that is not finite."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor except the head's under its Hugging Face name; all ranks must iterate.

        On rank 0 tensors are whole, on its device; other ranks get the same shapes and dtypes on the device "meta".
        """

    def weight_shapes(self) -> list[tuple[str, str, list[int]]]:
        """Return (Hugging Face name, dtype, shape) of the tensors that `weights` yields, in its order."""

    def save(self, folder: Path) -> Saving:
        """Copy weights, optimizer state and generators and write them in the background. OSError: the disk is full."""

    def load(self, folder: Path) -> None:
        """Read a checkpoint that `save` wrote in any layout. ValueError: it is incomplete, or of another model."""

    def present(self, *memory: Memory) -> AbstractContextManager[None]:
        """Keep this memory on the device inside the block; no effect before `start`."""

    def stop(self) -> None:
        """Leave the process group; another engine may start in this process."""


MakeEngine = Callable[[EngineSettings, ScalarHead | None, Sequence[str]], Engine]  # settings, head, patterns to freeze


def megatron(settings: EngineSettings, head: ScalarHead | None, freeze: Sequence[str]) -> Engine:
    """Make the Megatron engine; only processes that have one import megatron-core."""
    from trainer.megatron.engine import MegatronEngine

    return MegatronEngine(settings, head, freeze)


class HasEngine(Protocol):
    engine: Engine


W = TypeVar("W", bound=HasEngine)


def needs(*memory: Memory) -> Callable[[Callable[Concatenate[W, P], T]], Callable[Concatenate[W, P], T]]:
    """Declare the memory that a worker's method needs, and keep it on the device while the method runs."""

    def decorate(method: Callable[Concatenate[W, P], T]) -> Callable[Concatenate[W, P], T]:
        @functools.wraps(method)
        def inside(self: W, /, *args: P.args, **kwargs: P.kwargs) -> T:
            with self.engine.present(*memory):
                return method(self, *args, **kwargs)

        inside.needs = frozenset(memory)  # type: ignore[attr-defined]
        return inside

    return decorate


def needed(method: Callable[..., object]) -> frozenset[Memory]:
    """Return the memory that a worker's method needs on the device (see `needs`)."""
    found: frozenset[Memory] = getattr(method, "needs", frozenset())
    return found


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the learning rate at optimizer step 0, 1, ...

    It is a linear warm-up, then constant or a linear decay to final_lr_ratio * lr.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay_steps == 0:
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(1, config.decay_steps - config.warmup_steps))
    return config.lr * (1.0 - (1.0 - config.final_lr_ratio) * done)


def require_finite_norm(grad_norm: float, step: int) -> None:
    """Refuse an optimizer step. RuntimeError: its gradient norm is not finite."""
    if not grad_norm < float("inf"):
        raise RuntimeError(f"optimizer step {step}: gradient norm {grad_norm} is not finite")


def frozen_names(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match at least one pattern (`*`, `?`, `[...]`; whole names, case-sensitive).

    ValueError: a pattern that matches no name (the message lists the nearest names); nothing left to train.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = sorted(names, key=lambda name: -_likeness(name, pattern))[:3]
            raise ValueError(
                f"freeze pattern {pattern!r} matches none of the {len(names)} parameters; nearest: {', '.join(nearest)}"
            )
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(found) == len(names):
        raise ValueError(f"freeze={list(patterns)} matches all {len(names)} parameters: leave some to train")
    return found


def _likeness(name: str, pattern: str) -> float:
    """Return the similarity, 0 to 1, of the pattern without wildcards to the name or one of its components."""
    wanted = pattern.strip("*.")
    return max(SequenceMatcher(None, wanted, word).ratio() for word in (name, *name.split(".")))
