"""Assignment of episodes to engines. A router owns all engine clients of its process.

    sticky         all turns of an episode go to one engine, whose prefix cache holds the earlier turns
    least loaded   a new episode goes to the engine with the fewest open episodes; ties are broken in rotation
    healthy        an engine without progress gets no new episodes while another engine makes progress

An engine is lost when it can't be reached, or when it answers nothing at all during the whole time limit of a request;
slow answers to other requests count as progress. It is no longer lost when it answers a request: of an episode that is
still open on it, or a probe of one token. If all engines are lost, or there is only one, the router uses them anyway.
A router counts the episodes of its own process only. Engines come and go (`EngineRouter.use`), and a new episode waits
while there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rollout.engines.client import EngineUnreachable, Generation

PROBE_INTERVAL_S = 10.0
PROBE_IDS = [0]


class Client(Protocol):
    """The methods of an engine's client that a router needs."""

    answered: int  # number of answered calls

    async def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int], *, seed: int | None = None
    ) -> Generation: ...
    async def close(self) -> None: ...


@dataclass(eq=False)
class _Engine:
    url: str
    client: Client
    num_episodes: int = 0  # number of open episodes
    lost: bool = False
    gone: bool = False  # no longer used


@dataclass(eq=False)
class Lease:
    """The assignment of one episode to its engine."""

    _engine: _Engine
    _router: EngineRouter = field(repr=False)

    async def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int], *, seed: int
    ) -> Generation:
        """Sample one turn; see `EngineClient.generate`."""
        return await self._router.generate(self._engine, prompt_ids, max_new_tokens, stop_ids, seed=seed)


class EngineRouter:
    """Assigns an engine to each episode. Use it within one event loop."""

    def __init__(
        self, urls: Sequence[str], client_of: Callable[[str], Client], probe_interval_s: float = PROBE_INTERVAL_S
    ) -> None:
        """Use the engines at `urls`. `client_of` makes the client of one."""
        self._client_of = client_of
        self._engines = [_Engine(url, client_of(url)) for url in urls]
        self._arrived = asyncio.Event()  # of an engine, while there is none
        self._answered_before = 0  # by engines that are no longer used
        self._probe_interval_s = probe_interval_s
        self._probes: set[asyncio.Task[None]] = set()

    @property
    def answered(self) -> int:
        """Return the number of calls that the engines have answered, as a measure of progress."""
        return self._answered_before + sum(engine.client.answered for engine in self._engines)

    async def use(self, urls: Sequence[str]) -> None:
        """Replace the engines by those at `urls`; known ones are kept.

        Requests to an engine that is left out end by EngineUnreachable.
        """
        known = {engine.url: engine for engine in self._engines}
        self._engines = [known.pop(url) if url in known else _Engine(url, self._client_of(url)) for url in urls]
        if urls:
            self._arrived.set()
            self._arrived = asyncio.Event()
        for engine in known.values():
            self._answered_before += engine.client.answered
            engine.gone = True
            await engine.client.close()

    @contextlib.asynccontextmanager
    async def lease(self, number: int, attempt: int = 0) -> AsyncIterator[Lease]:
        """Hold an engine for one episode. Wait while there is none.

        `number` and `attempt` of the episode's ticket rotate the choice, so that a retry prefers another engine.
        """
        while not self._engines:
            await self._arrived.wait()
        engine = self._choose(number + attempt)
        engine.num_episodes += 1
        try:
            yield Lease(engine, self)
        finally:
            engine.num_episodes -= 1

    def _choose(self, turn: int) -> _Engine:
        count = len(self._engines)
        places = [place for place, engine in enumerate(self._engines) if not engine.lost] or range(count)
        return self._engines[min(places, key=lambda place: (self._engines[place].num_episodes, (place - turn) % count))]

    async def generate(
        self, engine: _Engine, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int], *, seed: int
    ) -> Generation:
        """Sample on an engine and record whether the engine makes progress."""
        before = engine.client.answered
        try:
            found = await engine.client.generate(prompt_ids, max_new_tokens, stop_ids, seed=seed)
        except EngineUnreachable:
            self._lose(engine)
            raise
        except TimeoutError:
            if engine.client.answered == before:
                self._lose(engine)
            raise
        engine.lost = False
        return found

    def _lose(self, engine: _Engine) -> None:
        if engine.lost or len(self._engines) == 1:
            return
        engine.lost = True
        probe = asyncio.get_running_loop().create_task(self._probe(engine))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, engine: _Engine) -> None:
        """Request one token from a lost engine until it answers."""
        while engine.lost and not engine.gone:
            await asyncio.sleep(self._probe_interval_s)
            with contextlib.suppress(RuntimeError, TimeoutError):
                await engine.client.generate(PROBE_IDS, 1, [])
                engine.lost = False

    async def close(self) -> None:
        """Cancel the probes and close the clients."""
        for probe in self._probes:
            probe.cancel()
        for engine in self._engines:
            await engine.client.close()
