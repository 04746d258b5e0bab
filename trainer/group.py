"""A role as its caller sees it: N Ray actors that are asked together and answer together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray


class WorkerGroup:
    """All ranks of one role."""

    def __init__(self, name: str, actors: Sequence[Any], timeout_s: float) -> None:
        self.name = name
        self.actors = list(actors)
        self.timeout_s = timeout_s

    def submit(self, method: str, *args: Any) -> list[Any]:
        """Asks every rank; returns the references of their answers."""
        return [getattr(actor, method).remote(*args) for actor in self.actors]

    def wait(self, refs: Sequence[Any], method: str, timeout_s: float | None = None) -> list[Any]:
        """Answers in rank order. TimeoutError names the ranks that are missing."""
        limit = timeout_s or self.timeout_s
        _, late = ray.wait(list(refs), num_returns=len(refs), timeout=limit)
        failed = [ref for ref in refs if ref not in late]
        if late:
            ray.get(failed, timeout=60)  # a rank that failed explains why the others wait
            ranks = [rank for rank, ref in enumerate(refs) if ref in late]
            raise TimeoutError(f"{self.name}.{method}: no answer from rank {ranks} in {limit:.0f} s")
        return ray.get(list(refs), timeout=60)

    def call(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Asks every rank and waits."""
        return self.wait(self.submit(method, *args), method, timeout_s)

    def start(self, timeout_s: float) -> None:
        """Lets the ranks meet at rank 0 and build their shards."""
        host, port = ray.get(self.actors[0].address.remote(), timeout=timeout_s)
        self.call("start", host, port, timeout_s=timeout_s)


def merged(parts: Sequence[dict[int, Any]]) -> dict[int, Any]:
    """Answers of `predict` from all ranks as one mapping, by sub-trace index."""
    return {index: out for part in parts for index, out in part.items()}


def reduced(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Answers of an update from all ranks: per-token means, and means over the optimizer steps."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, number in part["sums"].items():
            sums[name] = sums.get(name, 0.0) + number
    tokens = max(1.0, sums.pop("tokens"))
    means = {name: number / tokens for name, number in sums.items()}
    for name, numbers in parts[0]["steps"].items():
        means[name] = sum(numbers) / len(numbers)
    return means
