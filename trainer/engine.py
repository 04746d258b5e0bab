"""The engine of a training role: one process's shard of a model. It knows neither reinforcement learning nor Ray.

    worker (trainer/policy.py, critic/worker.py)     what is asked, which loss, whose tokens
      |  micro-batches, a loss of the model's output
    engine (trainer/megatron/, torch_engine.py)      forward, backward, optimizer, weights, checkpoints, memory

Every process of a role has one engine. All of them are asked the same, in the same order: they may wait for each other.
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
from trainer.models.shape import ModelShape

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is told at birth."""

    rank: int
    layout: LayoutConfig
    optimizer: OptimizerConfig
    model_folder: str
    seed: int
    threads: int
    timeout_s: float
    frozen: bool = False  # only forward passes: no gradients, no optimizer
    options: Mapping[str, Any] = field(default_factory=dict)  # of the engine's library, in addition to ours


@dataclass(frozen=True)
class ScalarHead:
    """A head of one number a token, in fp32, in place of the vocabulary projection: activation(w h + b).

    `init_std`: of w, drawn from the engine's seed; b starts at 0.
    """

    init_std: float
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class RankShare:
    """Which part of a role's batches one rank computes, and what their sizes must be multiples of."""

    row: int = 0  # data-parallel rank: number of the grid's row that it works on
    length_multiples: tuple[int, int] = (1, 1)  # of each sequence, and of all of a micro-batch together
    context: tuple[int, int] = (1, 0)  # processes that share the tokens of a sequence, and which of them this one is
    batch_multiple: int = 1  # of the number of micro-batches; empty ones fill up


class SummedLoss(NamedTuple):
    """A loss over the tokens of one micro-batch."""

    total: torch.Tensor  # differentiable sum; the engine divides by the optimizer step's action tokens
    sums: dict[str, torch.Tensor]  # for the metrics, added up over micro-batches and ranks
    maxima: dict[str, torch.Tensor]


# Model output (log-probabilities and entropies [2, P], or values [1, P]) and its micro-batch -> loss.
LossFunction = Callable[[torch.Tensor, MicroBatch], SummedLoss]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    grad_norm: float  # of all ranks' gradients together, before clipping
    lr: float
    losses: tuple[SummedLoss, ...]  # of each micro-batch; empty but on one process for each slice of the tokens


class Memory(Enum):
    """A kind of an engine's device memory, which may be in the host's memory while it is not needed."""

    weights = "weights"  # parameters, and what else the model keeps
    gradients = "gradients"  # of all parameters, in fp32
    state = "state"  # fp32 weights and Adam's moments


class Saving(Protocol):
    """One rank's part of a checkpoint on its way to the disk."""

    def result(self) -> bytes | None:
        """Return what `finish` needs from this rank; None while it is being written. OSError: it could not be
        written.
        """

    def finish(self, of_ranks: Sequence[bytes]) -> None:
        """Complete the checkpoint, on rank 0, with the results of all ranks in rank order. OSError: it could not."""


class Engine(Protocol):
    """One process's shard of a model. `start` must have returned on all ranks before anything else is asked.

    Memory that a call needs must be on the device (`present`); `update` brings the optimizer's state itself.
    """

    shape: ModelShape  # of the whole model
    share: RankShare
    device: torch.device

    def start(self, master: str, port: int) -> None:
        """Join the role's process group at rank 0's address, build the shard, read its weights.

        ValueError: the model's folder or the layout does not suit.
        """

    def forward(self, batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, torch.Tensor]]:
        """Compute without gradients each micro-batch's log-probabilities, or values with a scalar head, [A].

        Returns them on one process of every data-parallel row, nothing on the others.
        """

    def update(self, steps: Iterable[Sequence[MicroBatch]], loss: LossFunction) -> list[StepResult]:
        """Take one optimizer step for each list of micro-batches. RuntimeError: a gradient that is not finite."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor but the head's under its Hugging Face name; all ranks must iterate.

        On rank 0 tensors are whole, on its device; the others get the same shapes and dtypes on the device "meta".
        """

    def weight_shapes(self) -> list[tuple[str, str, list[int]]]:
        """Return (Hugging Face name, dtype, shape) of what `weights` yields, in its order."""

    def save(self, folder: Path) -> Saving:
        """Copy weights, optimizer state and generators aside and write them in the background. OSError: no room."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, in this or another layout. ValueError: it is not whole, or of another model."""

    def present(self, *memory: Memory) -> AbstractContextManager[None]:
        """Keep this memory on the device inside the block; before `start` it does nothing."""

    def stop(self) -> None:
        """Leave the process group; another engine may start in this process."""


MakeEngine = Callable[[EngineSettings, ScalarHead | None, Sequence[str]], Engine]  # settings, head, patterns to freeze


def megatron(settings: EngineSettings, head: ScalarHead | None, freeze: Sequence[str]) -> Engine:
    """Make the Megatron engine; only the processes that hold one import megatron-core."""
    from trainer.megatron.engine import MegatronEngine

    return MegatronEngine(settings, head, freeze)


class HasEngine(Protocol):
    engine: Engine


W = TypeVar("W", bound=HasEngine)


def needs(*memory: Memory) -> Callable[[Callable[Concatenate[W, P], T]], Callable[Concatenate[W, P], T]]:
    """Declare what a worker's method needs on the device, and have it there while the method runs."""

    def decorate(method: Callable[Concatenate[W, P], T]) -> Callable[Concatenate[W, P], T]:
        @functools.wraps(method)
        def inside(self: W, /, *args: P.args, **kwargs: P.kwargs) -> T:
            with self.engine.present(*memory):
                return method(self, *args, **kwargs)

        inside.needs = frozenset(memory)  # type: ignore[attr-defined]
        return inside

    return decorate


def needed(method: Callable[..., object]) -> frozenset[Memory]:
    """Return what a worker's method needs on the device (`needs`)."""
    found: frozenset[Memory] = getattr(method, "needs", frozenset())
    return found


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the learning rate at optimizer step 0, 1, ...: linear warm-up, then constant or linear decay to
    final_lr_ratio * lr.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay_steps == 0:
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(1, config.decay_steps - config.warmup_steps))
    return config.lr * (1.0 - (1.0 - config.final_lr_ratio) * done)


def require_finite_norm(grad_norm: float, step: int) -> None:
    """Refuse an optimizer step. RuntimeError: its gradient norm is NaN or infinite."""
    if not grad_norm < float("inf"):
        raise RuntimeError(f"optimizer step {step}: gradient norm {grad_norm} is not finite")


def frozen_names(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match at least one pattern (`*`, `?`, `[...]`; of the whole name, case counts).

    ValueError: a pattern that matches none, with the names that come nearest; nothing left to train.
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
    """0 to 1, of the pattern without its wildcards to the name or one of its parts."""
    wanted = pattern.strip("*.")
    return max(SequenceMatcher(None, wanted, part).ratio() for part in (name, *name.split(".")))
