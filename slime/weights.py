"""Publication of the policy's weights to the running engines.

    pause engines -> [ policy gathers and broadcasts a bucket | engines receive it ] ... -> resume, new version

The bytes travel from device to device over one torch.distributed group (gloo or nccl). Its rank 0 is the policy's rank
0; the other ranks are the engines' tensor-parallel ranks. This process handles only names and shapes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from rollout.config import PauseMode
from rollout.engines.client import EngineClient
from rollout.engines.group import EngineGroup
from rollout.sglang.delta import LOAD_FORMAT
from trainer.group import PolicyGroup, WorkerGroup
from trainer.publish.broadcast import buckets

T = TypeVar("T")
GROUP = "slime_weights"
NAMES_SHOWN = 8  # of tensors, in an error
Checksums = list[list[dict[str, str]]]  # [engine][tensor-parallel rank] {engine's tensor name: hash}


class Weights:
    """Publish the policy's weights to the engines.

    All members of the group must be alive in a publication. After `use_engines` or `use_policy`, the next publication
    first makes the group anew and then sends whole weights.
    """

    def __init__(self, policy: PolicyGroup, engines: EngineGroup, backend: str, timeout_s: float) -> None:
        self.policy = policy
        self.engines = engines
        self.timeout_s = timeout_s
        self._backend = backend
        self.version = -1
        self._members: tuple[str, ...] = ()  # engines in the group
        self._regroup = False  # whether the group must be made anew
        self._updating = False  # whether engines wait for the rest of an update
        self._held: Checksums = []  # hashes of what each engine holds, if changes are sent

    def connect(self) -> None:
        """Make the group in which weights are sent."""
        self._buckets = buckets(self.policy.weight_names().result(self.timeout_s))
        if self.engines.urls:
            asyncio.run(self._connect())

    async def _connect(self) -> None:
        host, port = self.policy.address().result(self.timeout_s)
        per_engine = self.engines.config.tensor_parallel
        world = 1 + per_engine * len(self.engines.urls)
        joining = self.policy.join_engines(host, port, world, GROUP, self._backend, self.timeout_s)
        async with self.engines.clients() as clients:
            ranks = range(1, world, per_engine)
            await asyncio.gather(
                *(
                    client.init_group(host, port, rank, world, GROUP, self._backend)
                    for client, rank in zip(clients, ranks, strict=True)
                )
            )
        joining.result(self.timeout_s)
        self._members = self.engines.urls

    def use_engines(self, urls: Sequence[str]) -> None:
        """Publish to the engines at `urls` from the next publication on. With no engine, nothing is sent."""
        self.engines, self._regroup = replace(self.engines, urls=tuple(urls)), True

    def use_policy(self, policy: PolicyGroup, trainers: Sequence[WorkerGroup]) -> None:
        """Publish the weights of these processes from now on. `trainers`: all groups of processes that hold a model."""
        self.policy, self._regroup = policy, True

    def _reconnect(self) -> None:
        # The policy leaves first: that ends the broadcast in which an engine may wait for a member that has died.
        self.policy.leave_engines().result(self.timeout_s)
        asyncio.run(self._disconnect())
        self._held = []
        self.connect()
        self._regroup = False

    async def _disconnect(self) -> None:
        """Let the living engines end an incomplete update and leave the group.

        They stay paused if they were: with half of an update they must not generate.
        """
        left = replace(self.engines, urls=tuple(url for url in self.engines.urls if url in self._members))
        async with left.clients() as clients:
            if self._updating:
                await asyncio.gather(*(_end_update(client) for client in clients))
            await _all(clients, lambda client: client.destroy_group(GROUP))
        self._members, self._updating = (), False

    def lend_memory(self) -> None:
        """Let training use the engines' memory if both share a GPU. Here they do not."""

    def publish(self, version: int) -> float:
        """Publish the policy's current weights to every engine as `version`, and return the seconds that it took.

        With `rollout.engine.delta` every publication but the first sends changes only. RuntimeError: then an engine
        does not hold what the last one left there.
        """
        began = time.perf_counter()
        if self._regroup:
            self._reconnect()
        if self.engines.urls:
            asyncio.run(self._publish(version))
        self.version = version
        return time.perf_counter() - began

    def verify(self) -> None:
        """Prove that every engine holds exactly the policy's weights. This takes a publication.

        The engines hash what they hold, have it overwritten with random numbers, are sent the policy's weights
        whole, and hash again. A tensor that was not as the policy has it, or that no publication reaches, has
        another hash then. RuntimeError names engine and tensors.
        """
        asyncio.run(self._verify())

    async def _publish(self, version: int) -> None:
        async with self.engines.clients() as clients:
            changes = self.engines.config.delta and bool(self._held)
            if changes:
                await self._check_base(clients)
            await self._swap(clients, version, changes)
            if self.engines.config.delta:
                self._held = await _all(clients, EngineClient.checksums)
            await self._check_version(clients, version)

    async def _verify(self) -> None:
        async with self.engines.clients() as clients:
            before: Checksums = await _all(clients, EngineClient.checksums)
            await self._swap(clients, self.version, changes=False, scramble=True)
            after: Checksums = await _all(clients, EngineClient.checksums)
        self._refuse(
            before, after, f"did not hold the weights that were published as version {self.version}, or is not sent"
        )

    async def _check_base(self, clients: Sequence[EngineClient]) -> None:
        """Refuse to send changes to an engine that does not hold their base. RuntimeError names it."""
        await self._check_version(clients, self.version)
        self._refuse(
            self._held, await _all(clients, EngineClient.checksums), f"no longer holds version {self.version} in"
        )

    async def _check_version(self, clients: Sequence[EngineClient], version: int) -> None:
        """Refuse an engine that holds other weights than those of `version`. RuntimeError names it."""
        versions = await _all(clients, EngineClient.version)
        for url, held in zip(self.engines.urls, versions, strict=True):
            if held != version:
                raise RuntimeError(
                    f"engine {url} holds weights of version {held}, the last publication was version {version}: start "
                    "the run again, which sends whole weights first"
                )

    def _refuse(self, expected: Checksums, found: Checksums, what: str) -> None:
        for url, wanted, held in zip(self.engines.urls, expected, found, strict=True):
            wrong = different(wanted, held)
            if wrong:
                more = f" and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
                raise RuntimeError(f"engine {url} {what}: {', '.join(wrong[:NAMES_SHOWN])}{more}")

    async def _swap(self, clients: Sequence[EngineClient], version: int, changes: bool, scramble: bool = False) -> None:
        mode = self.engines.config.pause
        load_format = LOAD_FORMAT if changes else None
        # The policy gathers its first bucket while the engines still generate.
        sending = self.policy.send_weights(changes, self.engines.config.delta)

        async def receive() -> None:
            await _all(clients, lambda client: client.pause(mode.value))
            if scramble:
                await _all(clients, EngineClient.scramble)
            self._updating = True
            await _all(clients, EngineClient.begin_update)
            for bucket in self._buckets:
                names, dtypes, shapes = (list(column) for column in zip(*bucket, strict=True))
                flush = mode is PauseMode.retract
                update = names, dtypes, shapes, GROUP, version, flush, load_format
                await asyncio.gather(*(client.update_bucket(*update) for client in clients))

        thread, limit_s = ThreadPoolExecutor(1), self.timeout_s * max(1, len(self._buckets))
        sent = asyncio.get_running_loop().run_in_executor(thread, sending.result, limit_s)
        thread.shutdown(wait=False)
        await asyncio.gather(sent, receive())  # whichever fails first is the reason
        await _all(clients, EngineClient.end_update)
        self._updating = False
        await _all(clients, EngineClient.resume)


class SharedGpuWeights(Weights):
    """Publication where all roles share a GPU: the engine has no weights and no KV cache while they train.

    NCCL takes no two members on one GPU, so the weights travel over gloo, through the host's memory.
    """

    def __init__(
        self, policy: PolicyGroup, engines: EngineGroup, timeout_s: float, trainers: Sequence[WorkerGroup]
    ) -> None:
        super().__init__(policy, engines, "gloo", timeout_s)
        self._trainers = list(trainers)
        self._lent = False

    def lend_memory(self) -> None:
        """Free the engines' memory for training. They must have no request, so training must be synchronous."""
        asyncio.run(self._engines(EngineClient.release_memory))
        self._lent = True

    def publish(self, version: int) -> float:
        """Let the engines allocate their memory again, and publish all weights, which they have lost."""
        if self._lent:
            for freed in [trainer.free_cache() for trainer in self._trainers]:
                freed.result(self.timeout_s)
            asyncio.run(self._engines(EngineClient.resume_memory))
            self._lent = False
            self._held = []  # no base for changes
        return super().publish(version)

    def use_policy(self, policy: PolicyGroup, trainers: Sequence[WorkerGroup]) -> None:
        """See `Weights.use_policy`."""
        super().use_policy(policy, trainers)
        self._trainers = list(trainers)

    async def _engines(self, ask: Callable[[EngineClient], Awaitable[None]]) -> None:
        async with self.engines.clients() as clients:
            await _all(clients, ask)


def different(wanted: Sequence[dict[str, str]], held: Sequence[dict[str, str]]) -> list[str]:
    """Return the sorted names of tensors whose hash differs on any tensor-parallel rank, or that one side lacks."""
    pairs = zip(wanted, held, strict=True)
    return sorted({name for one, two in pairs for name in one.keys() | two.keys() if one.get(name) != two.get(name)})


async def _end_update(client: EngineClient) -> None:
    with contextlib.suppress(RuntimeError):  # the update had not begun on this engine, or has ended there
        await client.end_update()


async def _all(clients: Sequence[EngineClient], ask: Callable[[EngineClient], Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*(ask(client) for client in clients)))
