"""A role as its caller sees it: N Ray actors that are asked together and answer together.

A call names the worker's method itself (`PolicyWorker.logprobs`), so that its arguments and its answer are checked, and
what it needs on the device is read from the method (`trainer.engine.needs`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import numpy as np
import ray

from buffer.packing import QUADRATIC, pack, split
from buffer.types import Batch, Float32, Grid, Scores, SubTrace, Targets, TokenColumn
from trainer.columns import policy_columns
from trainer.config import LayoutConfig, PolicyConfig
from trainer.engine import needed
from trainer.policy import PolicyWorker
from trainer.publish.broadcast import Weight
from trainer.worker import Columns, UpdateResult, Worker

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Update = Callable[[Any, Sequence[Any], Sequence[Any], Sequence[Grid]], UpdateResult]  # a worker's method


class Answer(Protocol[T_co]):
    """What was asked of a role."""

    def result(self, timeout_s: float | None = None) -> T_co:
        """Wait for it."""


class Ready(Generic[T]):
    """An answer that took no work."""

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self, timeout_s: float | None = None) -> T:
        return self._value


class Pending(Generic[T]):
    """A future resolved when every rank that was asked has answered."""

    def __init__(
        self, group: WorkerGroup, call: str, refs: Sequence[Any], finish: Callable[[list[Any]], T], units: int = 1
    ) -> None:
        """`call`: its name in messages. `units`: of work, one after the other, each of which may take `timeout_s`."""
        self._group = group
        self._call = call
        self._refs = list(refs)
        self._finish = finish
        self._units = max(1, units)

    def result(self, timeout_s: float | None = None) -> T:
        """Wait. TimeoutError names the ranks that are missing; a rank's own error passes through, at once."""
        self.wait(timeout_s)
        return self._finish(ray.get(self._refs, timeout=60))

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all ranks have answered; errors as of `result`."""
        limit = timeout_s or self._group.timeout_s * self._units
        late, deadline = list(self._refs), time.monotonic() + limit
        while late and (left_s := deadline - time.monotonic()) > 0:
            done, late = ray.wait(late, num_returns=len(late), timeout=min(1.0, left_s))
            ray.get(done, timeout=60)  # raises when a rank failed: the others may be waiting for it
        if late:
            ranks = sorted({self._refs.index(ref) % len(self._group.actors) for ref in late})
            raise TimeoutError(f"{self._group.name}.{self._call}: no answer from ranks {ranks} in {limit:.0f} s")


class SharedDevice:
    """Serializes the calls of roles that share a GPU, where one of them is on it only while it works.

    A role's call waits until what was asked of another one is answered. Its errors are raised there.
    """

    def __init__(self) -> None:
        self._last: tuple[WorkerGroup, Pending[Any]] | None = None

    def wait_for_others(self, group: WorkerGroup) -> None:
        """Wait until no other role is at work."""
        if self._last is not None and self._last[0] is not group:
            self._last[1].wait()

    def used_by(self, group: WorkerGroup, asked: Pending[Any]) -> None:
        """Note that the group works on what it was asked."""
        self._last = group, asked


class WorkerGroup:
    """All ranks of one role."""

    def __init__(self, name: str, actors: Sequence[Any], layout: LayoutConfig, timeout_s: float) -> None:
        self.name = name
        self.actors = list(actors)
        self.layout = layout
        self.timeout_s = timeout_s
        self.shared_device: SharedDevice | None = None  # with the other roles on its GPU
        self._quadratic = QUADRATIC

    def _send(self, method: Callable[Concatenate[Any, P], Any], *args: P.args, **kwargs: P.kwargs) -> list[Any]:
        """Calls a worker's method on every rank; returns references in rank order."""
        if self.shared_device is not None and needed(method):
            self.shared_device.wait_for_others(self)
        return [getattr(actor, method.__name__).remote(*args, **kwargs) for actor in self.actors]

    def _pending(
        self, method: Callable[..., Any], refs: Sequence[Any], finish: Callable[[list[Any]], T], units: int = 1
    ) -> Pending[T]:
        """The future of what `_send` returned. `units`: see `Pending`."""
        asked = Pending(self, method.__name__, refs, finish, units)
        if self.shared_device is not None and needed(method):
            self.shared_device.used_by(self, asked)
        return asked

    def _ask(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Pending[list[T]]:
        """Asks every rank; the result is their answers in rank order."""
        return self._pending(method, self._send(method, *args, **kwargs), list)

    def _ask_first(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        """Asks rank 0 alone, for what needs no device."""
        assert not needed(method), method
        ref = getattr(self.actors[0], method.__name__).remote(*args, **kwargs)
        return Pending(self, method.__name__, [ref], lambda answers: answers[0])

    def start(self, timeout_s: float) -> Pending[list[int]]:
        """Let the ranks meet at rank 0 and build their shards."""
        host, port = self._ask_first(Worker.address).result(timeout_s)
        return self._pending(Worker.start, self._send(Worker.start, host, port), self._started)

    def _started(self, hidden_sizes: list[int]) -> list[int]:
        self._quadratic = 1 / (12 * hidden_sizes[0])  # see buffer/packing.py
        return hidden_sizes

    def save(self, folder: Path) -> Pending[list[float]]:
        """Begin a checkpoint in a folder of its own; the result is seconds for which each rank stood still.

        Ranks go on writing it: see `saved`. OSError: no room on the disk.
        """
        return self._ask(Worker.save, str(folder.resolve()))

    def saved(self) -> Pending[list[bytes | None]]:
        """Return what each rank has written; None of one that is still writing. OSError: it could not be written."""
        return self._ask(Worker.saved)

    def finish_save(self, of_ranks: Sequence[bytes]) -> Pending[None]:
        """Make what all ranks have `saved` one checkpoint."""
        return self._ask_first(Worker.finish_save, of_ranks)

    def load(self, folder: Path) -> Pending[list[None]]:
        """Read a checkpoint that any layout wrote. ValueError: it is not whole, or of another model."""
        return self._ask(Worker.load, str(folder.resolve()))

    def free_cache(self) -> Pending[list[None]]:
        """Give GPU memory that is not in use back to the other processes on the GPU."""
        return self._ask(Worker.free_cache)

    def grid(self, indices: Sequence[int], num_tokens: Sequence[int]) -> Grid:
        """Return micro-batches of the named sub-traces for this role's data-parallel ranks."""
        layout = self.layout
        places = pack(num_tokens, layout.data_parallel, layout.max_tokens_per_micro_batch, quadratic=self._quadratic)
        return [[[indices[place] for place in micro] for micro in row] for row in places]

    def predict(self, method: Callable[[Any, Sequence[Any], Grid], TokenColumn], batch: Batch) -> Pending[TokenColumn]:
        """Predict over a whole batch: forward only."""
        grid = self.grid(range(len(batch.items)), [item.num_tokens for item in batch.items])
        asked = self._send(method, [item.ref for item in batch.items], grid)
        return self._pending(method, asked, TokenColumn.joined, depth([grid]))

    def peak_memory(self) -> dict[str, float]:
        """Return the metric `<role>/peak_memory_gb`: of the rank that has the most (`Worker.peak_memory_gb`)."""
        return {f"{self.name}/peak_memory_gb": max(self._ask(Worker.peak_memory_gb).result())}

    def minibatch_grids(self, batch: Batch, num_minibatches: int, rng: np.random.Generator) -> list[Grid]:
        """Return one grid for each optimizer step of an epoch: whole episodes, shuffled."""
        parts = split([item.episode_id for item in batch.items], num_minibatches, rng)
        return [self.grid(part, [batch.items[i].num_tokens for i in part]) for part in parts]

    def train(
        self, method: Update, batch: Batch, epochs: Iterable[tuple[Columns, list[Grid]]]
    ) -> Pending[dict[str, float]]:
        """Start epochs of optimizer steps; the result is per-token means and means over the optimizer steps."""
        items, asked, units = [item.ref for item in batch.items], [], 0
        for columns, grids in epochs:
            asked += self._send(method, items, self._rows(columns, grids), grids)
            units += depth(grids)
        return self._pending(method, asked, reduced, units)

    def _rows(self, columns: Columns, grids: Sequence[Grid]) -> list[Any]:
        """A reference for each data-parallel row, to the columns of its own sub-traces: no rank fetches all."""
        rows = []
        for number in range(self.layout.data_parallel):
            indices = sorted({index for grid in grids for micro in grid[number] for index in micro})
            rows.append(ray.put({name: column.part(indices) for name, column in columns.items()}))
        return rows


class PolicyGroup(WorkerGroup):
    """The policy's ranks."""

    def __init__(self, actors: Sequence[Any], config: PolicyConfig, timeout_s: float, name: str = "policy") -> None:
        super().__init__(name, actors, config.layout, timeout_s)
        self.config = config

    def logprobs(self, batch: Batch) -> Pending[TokenColumn]:
        """Return log-probabilities of a batch under the present weights."""
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

        `scores`: what was predicted before it. `corrections`: weight of every token's policy loss
        (trainer/losses/correction.py).
        """
        epochs = []
        for _ in range(self.config.num_epochs):
            grids = self.minibatch_grids(batch, self.config.num_minibatches, rng)
            columns = policy_columns(self.config, batch, sub_traces, targets, scores, corrections, grids)
            epochs.append((columns, grids))
        return self.train(PolicyWorker.update, batch, epochs)

    def export(self, folder: Path) -> Pending[list[None]]:
        """Write a Hugging Face folder with the present weights."""
        return self._ask(PolicyWorker.export, str(folder.resolve()))

    def weight_names(self) -> Pending[list[Weight]]:
        """Return (Hugging Face name, dtype, shape) of every tensor, in the order in which they are sent."""
        return self._ask_first(PolicyWorker.weight_names)

    def address(self) -> Pending[tuple[str, int]]:
        """Return the host and a port of rank 0, kept free, where it is about to meet the engines."""
        return self._ask_first(PolicyWorker.address)

    def join_engines(
        self, host: str, port: int, world_size: int, name: str, backend: str, timeout_s: float
    ) -> Pending[None]:
        """Let rank 0 join the group over which weights go to the engines; resolved when all of them have."""
        return self._ask_first(PolicyWorker.join_engines, host, port, world_size, name, backend, timeout_s)

    def send_weights(self, changes: bool, keep_base: bool) -> Pending[int]:
        """Broadcast the weights to the engines; the result is bytes sent. See `PolicyWorker.send_weights`."""
        return self._pending(PolicyWorker.send_weights, self._send(PolicyWorker.send_weights, changes, keep_base), sum)


class NoReference:
    """Stands where the frozen starting model would, when nothing is compared with it."""

    def logprobs(self, batch: Batch) -> Ready[TokenColumn]:
        return Ready(TokenColumn())


def depth(grids: Sequence[Grid]) -> int:
    """Return micro-batches that a rank does one after the other."""
    return sum(max((len(row) for row in grid), default=0) for grid in grids)


def reduced(results: Sequence[UpdateResult]) -> dict[str, float]:
    """Join the results of updates of all ranks: per-token means, maxima, and means over the optimizer steps.

    A number beyond the range of a float (a ratio that `dis` masks may be) is left out: metrics are finite.
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
    """Return `gradient/<part>` sums of |d loss / d log pi| as shares of all of it: `gradient_share/<part>`."""
    sizes = {name.removeprefix("gradient/"): size for name, size in metrics.items() if name.startswith("gradient/")}
    total = sum(sizes.values())
    rest = {name: number for name, number in metrics.items() if not name.startswith("gradient/")}
    return rest | {f"gradient_share/{part}": size / total if total else 0.0 for part, size in sizes.items()}
