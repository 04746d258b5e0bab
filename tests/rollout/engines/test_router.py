"""The router: sticky, least loaded, and away from engines that make no progress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from rollout.engines.client import EngineUnreachable
from rollout.engines.router import PROBE_IDS, EngineRouter, Lease

LIMIT_S = 60.0


class Client:
    """Answers with its number, or raises `error` if it is set."""

    def __init__(self, number: int) -> None:
        self.number, self.answered, self.error = number, 0, None
        self.asked: list[list[int]] = []
        self.closed = False

    error: Exception | None

    async def generate(self, prompt_ids: Any, max_new_tokens: int, stop_ids: Any, *, seed: int | None = None) -> Any:
        self.asked.append(list(prompt_ids))
        if self.error is not None:
            raise self.error
        self.answered += 1
        return self.number

    async def close(self) -> None:
        self.closed = True


def run(count: int, work: Callable[[EngineRouter, list[Client]], Awaitable[None]], interval_s: float = 3600.0) -> None:
    async def main() -> None:
        clients = [Client(number) for number in range(count)]
        router = EngineRouter([str(number) for number in range(count)], lambda url: clients[int(url)], interval_s)
        await asyncio.wait_for(work(router, clients), LIMIT_S)
        await router.close()
        assert all(client.closed for client in clients)

    asyncio.run(main())


async def engine_of(router: EngineRouter, number: int, attempt: int = 0) -> int:
    """Return the number of the engine that answers an episode of one turn."""
    async with router.lease(number, attempt) as lease:
        return await turn(lease)


async def turn(lease: Lease) -> int:
    answer: Any = await lease.generate([5], 1, [], seed=0)
    return int(answer)


def test_equal_engines_are_used_in_rotation_and_episodes_stay_where_they_are() -> None:
    async def work(router: EngineRouter, clients: list[Client]) -> None:
        async with AsyncExitStack() as stack:
            leases = [await stack.enter_async_context(router.lease(number)) for number in range(6)]
            for _ in range(3):
                assert [await turn(lease) for lease in leases] == [0, 1, 2, 0, 1, 2]
        assert router.answered == 18

    run(3, work)


def test_a_new_episode_goes_where_the_fewest_are_open() -> None:
    async def work(router: EngineRouter, clients: list[Client]) -> None:
        async with router.lease(0), router.lease(1):
            async with router.lease(2) as third:  # both have one episode; the ticket's number decides
                assert await turn(third) == 0
                assert await engine_of(router, 4) == 1  # by its number it would be 0
            assert await engine_of(router, 4) == 0

    run(2, work)


@pytest.mark.parametrize("error", [EngineUnreachable("gone"), TimeoutError("no answer")])
def test_a_retry_never_goes_back_to_a_lost_engine(error: Exception) -> None:
    """This holds even if the other engines have more episodes."""

    async def work(router: EngineRouter, clients: list[Client]) -> None:
        clients[1].error = error
        with pytest.raises(type(error)):
            await engine_of(router, 1)
        async with AsyncExitStack() as stack:
            for number in range(8):
                await stack.enter_async_context(router.lease(number))
            for attempt in range(1, 9):
                assert await engine_of(router, 1, attempt) in (0, 2)
        assert len(clients[1].asked) == 1

    run(3, work)


def test_an_engine_that_answers_others_meanwhile_is_slow_and_not_lost() -> None:
    async def work(router: EngineRouter, clients: list[Client]) -> None:
        class Slow(TimeoutError):
            pass

        async def late(*_: Any, **__: Any) -> Any:
            clients[1].answered += 1  # another request
            raise Slow

        answer, clients[1].generate = clients[1].generate, late  # type: ignore[method-assign]
        with pytest.raises(Slow):
            await engine_of(router, 1)
        clients[1].generate = answer  # type: ignore[method-assign]
        assert await engine_of(router, 1) == 1

    run(2, work)


def test_an_error_in_the_request_says_nothing_about_the_engine() -> None:
    async def work(router: EngineRouter, clients: list[Client]) -> None:
        clients[1].error = RuntimeError("answered 400")
        with pytest.raises(RuntimeError):
            await engine_of(router, 1)
        clients[1].error = None
        assert await engine_of(router, 1) == 1

    run(2, work)


def test_a_lost_engine_is_found_again_by_an_open_episode() -> None:
    async def work(router: EngineRouter, clients: list[Client]) -> None:
        async with router.lease(1) as lease:
            clients[1].error = EngineUnreachable("gone")
            with pytest.raises(EngineUnreachable):
                await turn(lease)
            clients[1].error = None
            assert await engine_of(router, 3) == 0
            assert await turn(lease) == 1
        assert await engine_of(router, 3) == 1

    run(2, work)


def test_a_lost_engine_is_found_again_by_a_probe() -> None:
    async def work(router: EngineRouter, clients: list[Client]) -> None:
        clients[1].error = EngineUnreachable("gone")
        with pytest.raises(EngineUnreachable):
            await engine_of(router, 1)
        while len(clients[1].asked) < 4:  # three probes, which fail
            await asyncio.sleep(0)
        clients[1].error = None
        while await engine_of(router, 1) != 1:
            await asyncio.sleep(0)
        assert clients[1].asked[1:4] == [PROBE_IDS] * 3

    run(2, work, interval_s=0.0)


def test_engines_come_and_go() -> None:
    async def work(router: EngineRouter, clients: list[Client]) -> None:
        clients.append(Client(2))
        async with router.lease(1) as lease:
            assert await turn(lease) == 1
            await router.use(["0", "2"])
            assert [client.closed for client in clients] == [False, True, False]
            assert [await engine_of(router, number) for number in range(4)] == [0, 2, 0, 2]
        assert router.answered == 5

    run(2, work)


def test_an_episode_waits_while_there_is_no_engine() -> None:
    async def work(router: EngineRouter, clients: list[Client]) -> None:
        await router.use([])
        waiting = asyncio.create_task(engine_of(router, 0))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        await router.use(["0"])
        assert await waiting == 0

    run(1, work)


@pytest.mark.parametrize("count", [1, 2])
def test_where_no_engine_is_left_they_are_used_as_before(count: int) -> None:
    """A single engine is never probed, because no other engine could be used meanwhile."""

    async def work(router: EngineRouter, clients: list[Client]) -> None:
        for client in clients:
            client.error = EngineUnreachable("gone")
        for number in range(count):
            with pytest.raises(EngineUnreachable):
                await engine_of(router, number)
        for client in clients:
            client.error = None
        assert await engine_of(router, count - 1) == count - 1
        assert all(PROBE_IDS not in client.asked for client in clients)

    run(count, work)
