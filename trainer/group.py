"""A role as its caller sees it: N Ray actors that are asked together and answer together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import ray

from buffer.packing import pack, split
from buffer.types import Batch, Float32, Grid, LossWeights, SubTrace, Targets
from trainer.config import LayoutConfig, Loss, LossNorm, PolicyConfig

T = TypeVar("T")


class Pending(Generic[T]):
    """An answer that all ranks of a role are working on."""

    def __init__(self, group: WorkerGroup, method: str, refs: Sequence[Any], finish: Callable[[list[Any]], T]) -> None:
        self._group = group
        self._method = method
        self._refs = list(refs)
        self._finish = finish

    def result(self, timeout_s: float | None = None) -> T:
        """Waits. TimeoutError names the ranks that are missing; a rank's own error passes through."""
        limit = timeout_s or self._group.timeout_s
        done, late = ray.wait(self._refs, num_returns=len(self._refs), timeout=limit)
        ray.get(done, timeout=60)  # a rank that failed explains why the others wait
        if late:
            ranks = sorted({self._refs.index(ref) % len(self._group.actors) for ref in late})
            raise TimeoutError(f"{self._group.name}.{self._method}: no answer from ranks {ranks} in {limit:.0f} s")
        return self._finish(ray.get(self._refs, timeout=60))


class WorkerGroup:
    """All ranks of one role."""

    def __init__(self, name: str, actors: Sequence[Any], layout: LayoutConfig, timeout_s: float) -> None:
        self.name = name
        self.actors = list(actors)
        self.layout = layout
        self.timeout_s = timeout_s

    def submit(self, method: str, *args: Any) -> Pending[list[Any]]:
        """Asks every rank; the result is their answers in rank order."""
        refs = [getattr(actor, method).remote(*args) for actor in self.actors]
        return Pending(self, method, refs, list)

    def start(self, timeout_s: float) -> Pending[list[Any]]:
        """Lets the ranks meet at rank 0 and build their shards."""
        host, port = ray.get(self.actors[0].address.remote(), timeout=timeout_s)
        return self.submit("start", host, port)

    def grid(self, indices: Sequence[int], num_tokens: Sequence[int]) -> Grid:
        """Micro-batches of the named sub-traces for this role's data-parallel ranks."""
        places = pack(num_tokens, self.layout.data_parallel, self.layout.max_tokens_per_micro_batch)
        return [[[indices[place] for place in micro] for micro in row] for row in places]

    def predict(self, method: str, batch: Batch) -> Pending[dict[int, Float32]]:
        """Forward only: float32 [T] of each sub-trace, by its index in the batch."""
        grid = self.grid(range(len(batch.items)), [item.num_tokens for item in batch.items])
        refs = [item.ref for item in batch.items]
        calls = [getattr(actor, method).remote(refs, grid) for actor in self.actors]
        return Pending(self, method, calls, lambda parts: {i: out for part in parts for i, out in part.items()})

    def minibatch_grids(self, batch: Batch, num_minibatches: int, rng: np.random.Generator) -> list[Grid]:
        """One grid for each optimizer step of an epoch: whole episodes, shuffled."""
        parts = split([item.episode_id for item in batch.items], num_minibatches, rng)
        return [self.grid(part, [batch.items[i].num_tokens for i in part]) for part in parts]

    def train(self, batch: Batch, epochs: Sequence[tuple[Mapping[str, Any], list[Grid]]]) -> Pending[dict[str, float]]:
        """Epochs of optimizer steps; the result is per-token means and means over the optimizer steps."""
        refs = [item.ref for item in batch.items]
        calls = []
        for fields, grids in epochs:
            shared = ray.put(fields)
            calls += [actor.update.remote(refs, shared, grids) for actor in self.actors]
        return Pending(self, "update", calls, reduced)


class PolicyGroup(WorkerGroup):
    """The policy's ranks."""

    def __init__(self, actors: Sequence[Any], config: PolicyConfig, timeout_s: float) -> None:
        super().__init__("policy", actors, config.layout, timeout_s)
        self.config = config

    def logprobs(self, batch: Batch) -> Pending[dict[int, Float32]]:
        """Log-probabilities of a batch under the present weights."""
        return self.predict("logprobs", batch)

    def imitate(self, batch: Batch, grid: Grid) -> Pending[dict[str, float]]:
        """One supervised optimizer step on a batch."""
        refs = [item.ref for item in batch.items]
        return Pending(self, "imitate", [actor.imitate.remote(refs, [grid]) for actor in self.actors], reduced)

    def update(
        self,
        batch: Batch,
        sub_traces: Sequence[SubTrace],
        targets: Sequence[Targets],
        logprobs: Mapping[int, Float32],
        rng: np.random.Generator,
    ) -> Pending[dict[str, float]]:
        """The policy's optimizer steps of one training step. `logprobs`: what `logprobs` answered before it."""
        epochs = []
        for _ in range(self.config.num_epochs):
            grids = self.minibatch_grids(batch, self.config.num_minibatches, rng)
            fields: dict[str, Any] = {
                "advantages": {i: target.advantages for i, target in enumerate(targets)},
                "weights": loss_weights(batch, sub_traces, grids, self.config.loss_norm),
            }
            if self.config.loss is Loss.ppo:
                fields["old_logprobs"] = dict(logprobs)
            else:
                fields["engine_logprobs"] = {i: trace.logprobs for i, trace in enumerate(sub_traces)}
            epochs.append((fields, grids))
        return self.train(batch, epochs)


def loss_weights(batch: Batch, sub_traces: Sequence[SubTrace], grids: Sequence[Grid], norm: LossNorm) -> LossWeights:
    """Weight of every token in its optimizer step's loss, float32 [T] by index; see trainer/losses.py."""
    weights: LossWeights = {}
    for grid in grids:
        indices = [i for row in grid for micro in row for i in micro]
        per_episode: dict[str, int] = {}
        for i in indices:
            item = batch.items[i]
            per_episode[item.episode_id] = per_episode.get(item.episode_id, 0) + item.num_actions
        total = sum(per_episode.values())
        for i in indices:
            mine = per_episode[batch.items[i].episode_id]
            weight = 1.0 if norm is LossNorm.token else total / (len(per_episode) * mine)
            weights[i] = np.full(len(sub_traces[i].tokens), weight, np.float32)
    return weights


def reduced(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Answers of updates from all ranks: per-token means, and means over the optimizer steps."""
    sums: dict[str, float] = {}
    steps: dict[str, list[float]] = {}
    for part in parts:
        for name, number in part["sums"].items():
            sums[name] = sums.get(name, 0.0) + number
        for name, numbers in part["steps"].items():
            steps.setdefault(name, []).extend(numbers)
    tokens = max(1.0, sums.pop("tokens"))
    means = {name: number / tokens for name, number in sums.items()}
    return means | {name: sum(numbers) / len(numbers) for name, numbers in steps.items()}
