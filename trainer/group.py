"""A role as its caller sees it: N Ray actors that are asked together and answer together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import ray

from buffer.packing import QUADRATIC, pack, split
from buffer.types import Batch, Float32, Grid, SubTrace, Targets
from trainer.config import LayoutConfig, PolicyConfig
from trainer.fields import policy_fields

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# What can be asked of a rank whose model is in the host's memory; all else needs the device.
WITHOUT_MODEL = frozenset(
    {"address", "weight_names", "join_engines", "saved", "finish_save", "free_cache", "peak_memory_gb", "stop"}
)


class Answer(Protocol[T_co]):
    """What was asked of a role."""

    def result(self, timeout_s: float | None = None) -> T_co:
        """Waits for it."""


class Ready(Generic[T]):
    """An answer that took no work."""

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self, timeout_s: float | None = None) -> T:
        return self._value


class Pending(Generic[T]):
    """An answer that all ranks of a role are working on."""

    def __init__(
        self, group: WorkerGroup, method: str, refs: Sequence[Any], finish: Callable[[list[Any]], T], units: int = 1
    ) -> None:
        """`units`: of work, one after the other, each of which may take the group's `timeout_s`."""
        self._group = group
        self._method = method
        self._refs = list(refs)
        self._finish = finish
        self._units = max(1, units)

    def result(self, timeout_s: float | None = None) -> T:
        """Waits. TimeoutError names the ranks that are missing; a rank's own error passes through, at once."""
        self.wait(timeout_s)
        return self._finish(ray.get(self._refs, timeout=60))

    def wait(self, timeout_s: float | None = None) -> None:
        """Until all ranks have answered; errors as of `result`."""
        limit = timeout_s or self._group.timeout_s * self._units
        late, deadline = list(self._refs), time.monotonic() + limit
        while late and (left_s := deadline - time.monotonic()) > 0:
            done, late = ray.wait(late, num_returns=len(late), timeout=min(1.0, left_s))
            ray.get(done, timeout=60)  # raises when a rank failed: the others may be waiting for it
        if late:
            ranks = sorted({self._refs.index(ref) % len(self._group.actors) for ref in late})
            raise TimeoutError(f"{self._group.name}.{self._method}: no answer from ranks {ranks} in {limit:.0f} s")


class Turns:
    """Of roles on the same GPU, whose memory is there only while they work: one works at a time.

    A role's call waits until what was asked of another one is answered. Its errors are raised there.
    """

    def __init__(self) -> None:
        self._last: tuple[WorkerGroup, Pending[Any]] | None = None

    def wait(self, group: WorkerGroup) -> None:
        """Until it is the group's turn."""
        if self._last is not None and self._last[0] is not group:
            self._last[1].wait()

    def taken(self, group: WorkerGroup, asked: Pending[Any]) -> None:
        """The group works on what it was asked."""
        self._last = group, asked


class WorkerGroup:
    """All ranks of one role."""

    def __init__(self, name: str, actors: Sequence[Any], layout: LayoutConfig, timeout_s: float) -> None:
        self.name = name
        self.actors = list(actors)
        self.layout = layout
        self.timeout_s = timeout_s
        self.turns: Turns | None = None  # shared with the other roles on its GPU
        self._quadratic = QUADRATIC

    def _ask(
        self, method: str, calls: Iterable[tuple[Any, ...]], finish: Callable[[list[Any]], T], units: int = 1
    ) -> Pending[T]:
        """Calls a method of every rank, once for each tuple of arguments. `units`: see `Pending`."""
        turns = None if method in WITHOUT_MODEL else self.turns
        if turns:
            turns.wait(self)
        refs = [getattr(actor, method).remote(*arguments) for arguments in calls for actor in self.actors]
        asked = Pending(self, method, refs, finish, units)
        if turns:
            turns.taken(self, asked)
        return asked

    def submit(self, method: str, *args: Any) -> Pending[list[Any]]:
        """Asks every rank; the result is their answers in rank order."""
        return self._ask(method, [args], list)

    def start(self, timeout_s: float) -> Pending[list[Any]]:
        """Lets the ranks meet at rank 0 and build their shards."""
        host, port = ray.get(self.actors[0].address.remote(), timeout=timeout_s)
        return self._ask("start", [(host, port)], self._started)

    def _started(self, hidden_sizes: list[int]) -> list[int]:
        self._quadratic = 1 / (12 * hidden_sizes[0])  # see buffer/packing.py
        return hidden_sizes

    def grid(self, indices: Sequence[int], num_tokens: Sequence[int]) -> Grid:
        """Micro-batches of the named sub-traces for this role's data-parallel ranks."""
        layout = self.layout
        places = pack(num_tokens, layout.data_parallel, layout.max_tokens_per_micro_batch, quadratic=self._quadratic)
        return [[[indices[place] for place in micro] for micro in row] for row in places]

    def predict(self, method: str, batch: Batch) -> Pending[dict[int, Float32]]:
        """Forward only: float32 [T] of each sub-trace, by its index in the batch."""
        grid = self.grid(range(len(batch.items)), [item.num_tokens for item in batch.items])
        refs = [item.ref for item in batch.items]
        return self._ask(
            method, [(refs, grid)], lambda parts: {i: out for part in parts for i, out in part.items()}, depth([grid])
        )

    def peak_memory(self) -> dict[str, float]:
        """The metric `<role>/peak_memory_gb`: of the rank that has the most (`MegatronWorker.peak_memory_gb`)."""
        return {f"{self.name}/peak_memory_gb": max(self.submit("peak_memory_gb").result())}

    def minibatch_grids(self, batch: Batch, num_minibatches: int, rng: np.random.Generator) -> list[Grid]:
        """One grid for each optimizer step of an epoch: whole episodes, shuffled."""
        parts = split([item.episode_id for item in batch.items], num_minibatches, rng)
        return [self.grid(part, [batch.items[i].num_tokens for i in part]) for part in parts]

    def train(self, batch: Batch, epochs: Sequence[tuple[Mapping[str, Any], list[Grid]]]) -> Pending[dict[str, float]]:
        """Epochs of optimizer steps; the result is per-token means and means over the optimizer steps."""
        refs = [item.ref for item in batch.items]
        units = sum(depth(grids) for _, grids in epochs)
        return self._ask("update", ((refs, ray.put(fields), grids) for fields, grids in epochs), reduced, units)


class PolicyGroup(WorkerGroup):
    """The policy's ranks."""

    def __init__(self, actors: Sequence[Any], config: PolicyConfig, timeout_s: float, name: str = "policy") -> None:
        super().__init__(name, actors, config.layout, timeout_s)
        self.config = config

    def logprobs(self, batch: Batch) -> Pending[dict[int, Float32]]:
        """Log-probabilities of a batch under the present weights."""
        return self.predict("logprobs", batch)

    def imitate(self, batch: Batch, grid: Grid) -> Pending[dict[str, float]]:
        """One supervised optimizer step on a batch."""
        refs = [item.ref for item in batch.items]
        return self._ask("imitate", [(refs, [grid])], reduced, depth([grid]))

    def update(
        self,
        batch: Batch,
        sub_traces: Sequence[SubTrace],
        targets: Sequence[Targets],
        logprobs: Mapping[int, Float32],
        reference_logprobs: Mapping[int, Float32],
        corrections: Sequence[Float32],
        rng: np.random.Generator,
    ) -> Pending[dict[str, float]]:
        """The policy's optimizer steps of one training step.

        `logprobs`: what `logprobs` answered before it. `reference_logprobs`: those of the reference model, empty
        when there is none. `corrections`: weight of every token's policy loss (trainer/losses/correction.py).
        """
        epochs = []
        for _ in range(self.config.num_epochs):
            grids = self.minibatch_grids(batch, self.config.num_minibatches, rng)
            fields = policy_fields(
                self.config, batch, sub_traces, targets, logprobs, reference_logprobs, corrections, grids
            )
            epochs.append((fields, grids))
        return self.train(batch, epochs)


class NoReference:
    """Stands where the frozen starting model would, when nothing is compared with it."""

    def logprobs(self, batch: Batch) -> Ready[dict[int, Float32]]:
        return Ready({})


def depth(grids: Sequence[Grid]) -> int:
    """Micro-batches that a rank does one after the other."""
    return sum(max((len(row) for row in grid), default=0) for grid in grids)


def reduced(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Answers of updates from all ranks: per-token means, maxima, and means over the optimizer steps.

    A number beyond the range of a float (a ratio that `dis` masks may be) is left out: metrics are finite.
    """
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    steps: dict[str, list[float]] = {}
    for part in parts:
        for name, number in part["sums"].items():
            sums[name] = sums.get(name, 0.0) + number
        for name, number in part["maxima"].items():
            maxima[name] = max(maxima.get(name, number), number)
        for name, numbers in part["steps"].items():
            steps.setdefault(name, []).extend(numbers)
    tokens = max(1.0, sums.pop("tokens"))
    means = {name: number / tokens for name, number in sums.items()}
    means |= maxima | {name: sum(numbers) / len(numbers) for name, numbers in steps.items()}
    return gradient_shares({name: number for name, number in means.items() if math.isfinite(number)})


def gradient_shares(metrics: dict[str, float]) -> dict[str, float]:
    """`gradient/<part>` sums of |d loss / d log pi| as shares of all of it: `gradient_share/<part>`."""
    sizes = {name.removeprefix("gradient/"): size for name, size in metrics.items() if name.startswith("gradient/")}
    total = sum(sizes.values())
    rest = {name: number for name, number in metrics.items() if not name.startswith("gradient/")}
    return rest | {f"gradient_share/{part}": size / total if total else 0.0 for part, size in sizes.items()}
