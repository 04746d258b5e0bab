"""Weights from the policy's ranks into the running engines.

    pause engines -> [ policy gathers and broadcasts a bucket | engines receive it ] ... -> go on, new version

The bytes go device to device over one torch.distributed group (gloo or nccl): rank 0 is the policy's
rank 0, the engines' tensor-parallel ranks follow. Nothing but names and shapes passes through here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import ray

from rollout.client import EngineClient
from rollout.config import PauseMode
from rollout.group import EngineGroup
from trainer.group import PolicyGroup, WorkerGroup

GROUP = "slime_weights"
BUCKET_BYTES = 1 << 29
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Bucket = list[tuple[str, str, list[int]]]


def buckets(tensors: Sequence[tuple[str, str, list[int]]], limit: int = BUCKET_BYTES) -> list[Bucket]:
    """Splits (name, dtype, shape) in order into buckets of at most `limit` bytes, or of one larger tensor."""
    found: list[Bucket] = []
    size = limit + 1
    for name, dtype, shape in tensors:
        count = _BYTES[dtype]
        for n in shape:
            count *= n
        if size + count > limit:
            found.append([])
            size = 0
        found[-1].append((name, dtype, shape))
        size += count
    return found


class Weights:
    """The one path from policy to engines."""

    def __init__(self, policy: PolicyGroup, engines: EngineGroup, backend: str, timeout_s: float) -> None:
        self.policy = policy
        self.engines = engines
        self.timeout_s = timeout_s
        self._backend = backend
        self.version = -1

    def connect(self) -> None:
        """Makes the group that weights travel over."""
        asyncio.run(self._connect())
        names = ray.get(self.policy.actors[0].weight_names.remote(), timeout=self.timeout_s)
        self._buckets = buckets(names)

    async def _connect(self) -> None:
        host, port = ray.get(self.policy.actors[0].address.remote(), timeout=self.timeout_s)
        per_engine = self.engines.config.tensor_parallel
        world = 1 + per_engine * len(self.engines.urls)
        joining = self.policy.submit("join_engines", host, port, world, GROUP, self._backend, self.timeout_s)
        async with self.engines.clients() as clients:
            ranks = range(1, world, per_engine)
            await asyncio.gather(
                *(
                    client.init_group(host, port, rank, world, GROUP, self._backend)
                    for client, rank in zip(clients, ranks, strict=True)
                )
            )
        joining.result(self.timeout_s)

    def lend_memory(self) -> None:
        """Training begins: where engines and trainers share a GPU, it may use the engines' memory. Not here."""

    def publish(self, version: int) -> float:
        """Puts the policy's present weights into every engine under `version`; returns seconds."""
        began = time.perf_counter()
        asyncio.run(self._publish(version))
        self.version = version
        return time.perf_counter() - began

    async def _publish(self, version: int) -> None:
        async with self.engines.clients() as clients:
            mode = self.engines.config.pause
            await _all(clients, "pause", mode.value)
            await _all(clients, "begin_update")
            sending = self.policy.submit("send_weights")
            for bucket in self._buckets:
                names, dtypes, shapes = (list(column) for column in zip(*bucket, strict=True))
                await _all(clients, "update_bucket", names, dtypes, shapes, GROUP, version, mode is PauseMode.retract)
            sending.result(self.timeout_s)
            await _all(clients, "end_update")
            await _all(clients, "resume")


class SharedGpuWeights(Weights):
    """Where all roles lie on one GPU: while they train, the engine keeps neither weights nor KV cache.

    NCCL takes no two members on one GPU, so the weights travel over gloo, through the host's memory.
    """

    def __init__(
        self, policy: PolicyGroup, engines: EngineGroup, timeout_s: float, trainers: Sequence[WorkerGroup]
    ) -> None:
        super().__init__(policy, engines, "gloo", timeout_s)
        self._trainers = list(trainers)
        self._lent = False

    def lend_memory(self) -> None:
        """The engines must have no request: synchronous training."""
        asyncio.run(self._ask("release_memory"))
        self._lent = True

    def publish(self, version: int) -> float:
        """The engines take their memory back, then the weights, all of which they have lost."""
        if self._lent:
            for freed in [trainer.submit("free_cache") for trainer in self._trainers]:
                freed.result(self.timeout_s)
            asyncio.run(self._ask("resume_memory"))
            self._lent = False
        return super().publish(version)

    async def _ask(self, method: str) -> None:
        async with self.engines.clients() as clients:
            await _all(clients, method)


async def _all(clients: Sequence[EngineClient], method: str, *args: Any) -> None:
    await asyncio.gather(*(getattr(client, method)(*args) for client in clients))
