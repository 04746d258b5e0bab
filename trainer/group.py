"""Typed handles of roles: each calls the N Ray actors of one role together and joins their answers.

A call names the worker's method itself (`PolicyWorker.logprobs`), so that a type checker sees its arguments and its
answer, and the memory that it needs on the device is read from the method (`trainer.engine.needs`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import numpy as np
import ray

from buffer.packing import QUADRATIC, pack, split
from buffer.types import Batch, Float32, Grid, Scores, SubTrace, Targets, TokenColumn
from machine.actors import call
from machine.waits import overdue
from trainer.columns import policy_columns
from trainer.config import PolicyConfig, RoleConfig
from trainer.engine import needed
from trainer.policy import PolicyWorker
from trainer.publish.broadcast import Weight
from trainer.worker import Columns, UpdateResult, Worker

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")  # of one rank
T_co = TypeVar("T_co", covariant=True)
Update = Callable[[Any, Sequence[Any], Sequence[Any], Sequence[Grid]], UpdateResult]  # a worker's method


class Answer(Protocol[T_co]):
    """The answer of a role to a call."""

    def result(self, timeout_s: float | None = None) -> T_co:
        """Wait for the answer and return it."""


class Ready(Generic[T]):
    """An answer that is available at once."""

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self, timeout_s: float | None = None) -> T:
        return self._value


class Pending(Generic[T]):
    """A future resolved when every rank that was called has answered."""

    def __init__(
        self,
        group: WorkerGroup,
        call: str,
        refs: Sequence[ObjectRef[A]],
        finish: Callable[[list[A]], T],
        units: int = 1,
    ) -> None:
        """Wrap references. `call`: name in messages. `units`: sequential units of work, up to `timeout_s` each."""
        self._group = group
        self._call = call
        self._refs: list[ObjectRef[Any]] = list(refs)
        self._finish: Callable[[list[Any]], T] = finish
        self._units = max(1, units)

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for the answer and return it.

        TimeoutError: some ranks have not answered; see `machine.waits.overdue`. A rank's own error is raised at once.
        """
        self.wait(timeout_s)
        return self._finish(ray.get(self._refs, timeout=60))

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all ranks have answered. Errors: see `result`."""
        limit = timeout_s or self._group.timeout_s * self._units
        late, deadline = list(self._refs), time.monotonic() + limit
        while late and (left_s := deadline - time.monotonic()) > 0:
            done, late = ray.wait(late, num_returns=len(late), timeout=min(1.0, left_s))
            ray.get(done, timeout=60)  # raises when a rank failed: the others may be waiting for it
        if late:
            ranks = sorted({self._refs.index(ref) % len(self._group.actors) for ref in late})
            others = {f"{self._group.name} rank {rank}": self._group.actors[rank] for rank in ranks}
            raise overdue(f"{self._group.name}.{self._call}", others, limit)


class SharedDevice:
    """Serializes the calls of roles that share a GPU and occupy its memory only while they work.

    A role's call waits until the pending call of another role is answered, and raises that call's errors.
    """

    def __init__(self) -> None:
        self._last: tuple[WorkerGroup, Pending[Any]] | None = None

    def wait_for_others(self, group: WorkerGroup) -> None:
        """Wait until no other role is working."""
        if self._last is not None and self._last[0] is not group:
            self._last[1].wait()

    def used_by(self, group: WorkerGroup, asked: Pending[Any]) -> None:
        """Note that the group is working on a call."""
        self._last = group, asked


class WorkerGroup:
    """All ranks of one role."""

    def __init__(self, name: str, actors: Sequence[ActorHandle[Any]], config: RoleConfig, timeout_s: float) -> None:
        self.name = name
        self.actors = list(actors)
        self.layout = config.layout
        self.data_parallel = config.data_parallel
        self.timeout_s = timeout_s
        self.shared_device: SharedDevice | None = None  # shared with the other roles on its GPU
        self._quadratic = QUADRATIC

    def _send(self, method: Callable[Concatenate[Any, P], A], *args: P.args, **kwargs: P.kwargs) -> list[ObjectRef[A]]:
        """Call a worker's method on every rank and return the references in rank order."""
        if self.shared_device is not None and needed(method):
            self.shared_device.wait_for_others(self)
        return [call(actor, method, *args, **kwargs) for actor in self.actors]

    def _pending(
        self, method: Callable[..., A], refs: Sequence[ObjectRef[A]], finish: Callable[[list[A]], T], units: int = 1
    ) -> Pending[T]:
        """Return the future of the references that `_send` returned. `units`: see `Pending`."""
        asked = Pending(self, method.__name__, refs, finish, units)
        if self.shared_device is not None and needed(method):
            self.shared_device.used_by(self, asked)
        return asked

    def _ask(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Pending[list[T]]:
        """Call every rank; the result is their answers in rank order."""
        return self._pending(method, self._send(method, *args, **kwargs), list)

    def _ask_first(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        """Call rank 0 alone, with a method that needs no device memory."""
        assert not needed(method), method
        ref = call(self.actors[0], method, *args, **kwargs)
        return Pending(self, method.__name__, [ref], lambda answers: answers[0])

    def start(self, timeout_s: float) -> Pending[list[int]]:
        """Let the ranks meet at rank 0 and build their shards."""
        host, port = self._ask_first(Worker.address).result(timeout_s)
        return self._pending(Worker.start, self._send(Worker.start, host, port), self._started)

    def _started(self, hidden_sizes: list[int]) -> list[int]:
        self._quadratic = 1 / (12 * hidden_sizes[0])  # see buffer/packing.py
        return hidden_sizes

    def save(self, folder: Path) -> Pending[list[float]]:
        """Begin a checkpoint in a folder of its own; the result is the seconds for which each rank was blocked.

        Ranks write it in the background: see `saved`. OSError: the disk is full.
        """
        return self._ask(Worker.save, str(folder.resolve()))

    def saved(self) -> Pending[list[bytes | None]]:
        """Return the results of all ranks; None for a rank that is still writing. OSError: it could not write."""
        return self._ask(Worker.saved)

    def finish_save(self, of_ranks: Sequence[bytes]) -> Pending[None]:
        """Complete the checkpoint from the results that `saved` returned for all ranks."""
        return self._ask_first(Worker.finish_save, of_ranks)

    def load(self, folder: Path) -> Pending[list[None]]:
        """Read a checkpoint written in any layout. ValueError: it is incomplete, or of another model."""
        return self._ask(Worker.load, str(folder.resolve()))

    def free_cache(self) -> Pending[list[None]]:
        """Free cached GPU memory for the other processes on the GPU."""
        return self._ask(Worker.free_cache)

    def grid(self, indices: Sequence[int], num_tokens: Sequence[int]) -> Grid:
        """Return a grid: micro-batches of these sub-traces for each of this role's data-parallel ranks."""
        limit = self.layout.max_tokens_per_micro_batch
        rows = pack(num_tokens, self.data_parallel, limit, quadratic=self._quadratic)
        return [[[indices[k] for k in micro] for micro in row] for row in rows]

    def predict(self, method: Callable[[Any, Sequence[Any], Grid], TokenColumn], batch: Batch) -> Pending[TokenColumn]:
        """Predict over a whole batch; forward passes only."""
        grid = self.grid(range(len(batch.items)), [item.num_tokens for item in batch.items])
        asked = self._send(method, [item.ref for item in batch.items], grid)
        return self._pending(method, asked, TokenColumn.joined, depth([grid]))

    def peak_memory(self) -> dict[str, float]:
        """Return the metric `<role>/peak_memory_gb`: maximum of `Worker.peak_memory_gb` over ranks, in 1e9 bytes."""
        return {f"{self.name}/peak_memory_gb": max(self._ask(Worker.peak_memory_gb).result())}

    def minibatch_grids(self, batch: Batch, num_minibatches: int, rng: np.random.Generator) -> list[Grid]:
        """Return one grid for each optimizer step of an epoch: whole episodes, shuffled."""
        minibatches = split([item.episode_id for item in batch.items], num_minibatches, rng)
        return [self.grid(chosen, [batch.items[i].num_tokens for i in chosen]) for chosen in minibatches]

    def train(
        self, method: Update, batch: Batch, epochs: Iterable[tuple[Columns, list[Grid]]]
    ) -> Pending[dict[str, float]]:
        """Start epochs of optimizer steps; the result is per-token means and means over the optimizer steps."""
        items, asked, units = [item.ref for item in batch.items], [], 0
        for columns, grids in epochs:
            asked += self._send(method, items, self._rows(columns, grids), grids)
            units += depth(grids)
        return self._pending(method, asked, reduced, units)

    def _rows(self, columns: Columns, grids: Sequence[Grid]) -> list[ObjectRef[Columns]]:
        """Return a reference for each data-parallel row to the columns of its own sub-traces: no rank fetches all."""
        rows: list[ObjectRef[Columns]] = []
        for number in range(self.data_parallel):
            indices = sorted({index for grid in grids for micro in grid[number] for index in micro})
            rows.append(ray.put({name: column.part(indices) for name, column in columns.items()}))
        return rows


class PolicyGroup(WorkerGroup):
    """The policy's ranks."""

    def __init__(
        self, actors: Sequence[ActorHandle[Any]], config: PolicyConfig, timeout_s: float, name: str = "policy"
    ) -> None:
        super().__init__(name, actors, config, timeout_s)
        self.config = config

    def logprobs(self, batch: Batch) -> Pending[TokenColumn]:
        """Return log-probabilities of a batch under the current weights, float32 [T] for each sub-trace."""
        return self.predict(PolicyWorker.logprobs, batch)

    def imitate(self, batch: Batch, grid: Grid) -> Pending[dict[str, float]]:
        """Start one supervised optimizer step on a batch."""
        asked = self._send(PolicyWorker.imitate, [item.ref for item in batch.items], [grid])
        return self._pending(PolicyWorker.imitate, asked, reduced, depth([grid]))

    def update(
        self,
        batch: Batch,
        sub_traces: Sequence[SubTrace],
        targets: Sequence[Targets],
        scores: Scores,
        corrections: Sequence[Float32],
        rng: np.random.Generator,
    ) -> Pending[dict[str, float]]:
        """Start the policy's optimizer steps of one training step.

        `scores`: the predictions made before it. `corrections`: the weight of every token's policy loss
        (trainer/losses/correction.py).
        """
        epochs = []
        for _ in range(self.config.num_epochs):
            grids = self.minibatch_grids(batch, self.config.num_minibatches, rng)
            columns = policy_columns(self.config, batch, sub_traces, targets, scores, corrections, grids)
            epochs.append((columns, grids))
        return self.train(PolicyWorker.update, batch, epochs)

    def export(self, folder: Path) -> Pending[list[None]]:
        """Write a Hugging Face folder with the current weights."""
        return self._ask(PolicyWorker.export, str(folder.resolve()))

    def weight_names(self) -> Pending[list[Weight]]:
        """Return (Hugging Face name, dtype, shape) of every tensor, in the order in which they are sent."""
        return self._ask_first(PolicyWorker.weight_names)

    def address(self) -> Pending[tuple[str, int]]:
        """Return the host and a reserved port of rank 0, where it will meet the engines."""
        return self._ask_first(PolicyWorker.address)

    def join_engines(
        self, host: str, port: int, world_size: int, name: str, backend: str, timeout_s: float
    ) -> Pending[None]:
        """Let rank 0 join the group over which weights go to the engines; resolved when all engines have joined."""
        return self._ask_first(PolicyWorker.join_engines, host, port, world_size, name, backend, timeout_s)

    def leave_engines(self) -> Pending[None]:
        """Let rank 0 leave the group over which weights go to the engines, if it is in one."""
        return self._ask_first(PolicyWorker.leave_engines)

    def send_weights(self, changes: bool, keep_base: bool) -> Pending[int]:
        """Broadcast the weights to the engines; the result is the bytes sent. See `PolicyWorker.send_weights`."""
        return self._pending(PolicyWorker.send_weights, self._send(PolicyWorker.send_weights, changes, keep_base), sum)


class NoReference:
    """The null object used when a run has no reference model."""

    def logprobs(self, batch: Batch) -> Ready[TokenColumn]:
        return Ready(TokenColumn())


def depth(grids: Sequence[Grid]) -> int:
    """Return the number of micro-batches that a rank computes sequentially."""
    return sum(max((len(row) for row in grid), default=0) for grid in grids)


def reduced(results: Sequence[UpdateResult]) -> dict[str, float]:
    """Join the update results of all ranks: per-token means, maxima, and means over the optimizer steps.

    Non-finite numbers (possible for a ratio that `dis` masks) are omitted: metrics are finite.
    """
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    steps: dict[str, list[float]] = {"grad_norm": [], "lr": []}
    for result in results:
        for name, number in result.sums.items():
            sums[name] = sums.get(name, 0.0) + number
        for name, number in result.maxima.items():
            maxima[name] = max(maxima.get(name, number), number)
        steps["grad_norm"] += result.grad_norms
        steps["lr"] += result.lrs
    tokens = max(1.0, sums.pop("tokens"))
    means = {name: number / tokens for name, number in sums.items()}
    means |= maxima | {name: sum(numbers) / len(numbers) for name, numbers in steps.items()}
    return gradient_shares({name: number for name, number in means.items() if math.isfinite(number)})


def gradient_shares(metrics: dict[str, float]) -> dict[str, float]:
    """Return the sums `gradient/<kind>` of |d loss / d log pi| as shares of their total: `gradient_share/<kind>`."""
    sizes = {name.removeprefix("gradient/"): size for name, size in metrics.items() if name.startswith("gradient/")}
    total = sum(sizes.values())
    rest = {name: number for name, number in metrics.items() if not name.startswith("gradient/")}
    return rest | {f"gradient_share/{kind}": size / total if total else 0.0 for kind, size in sizes.items()}
