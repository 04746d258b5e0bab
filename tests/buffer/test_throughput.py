"""The sampling rate: tokens per time in which episodes ran, regardless of other waits in a step."""

from __future__ import annotations

import asyncio

import pytest
from episodes import sub_trace_of

from buffer.actor import BufferActor
from buffer.config import BufferConfig
from buffer.store import Ticket
from buffer.throughput import Throughput
from buffer.types import EpisodeStats


class Clock:
    """A clock that is set by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_seconds_in_which_nothing_ran_do_not_count() -> None:
    meter = Throughput()
    assert meter.tokens_per_s(5.0) is None
    meter.runs(True, 10.0)
    meter.runs(True, 12.0)  # a second episode runs concurrently
    meter.finished(300)
    meter.runs(False, 16.0)
    assert meter.tokens_per_s(90.0) == 300 / 6
    meter.runs(True, 100.0)
    assert meter.tokens_per_s(104.0) == 300 / 10
    meter.reset(104.0)
    assert meter.tokens_per_s(104.0) is None
    meter.finished(40)
    assert meter.tokens_per_s(108.0) == 40 / 4


def test_a_step_whose_episodes_ran_before_it_began_has_the_rate_of_that_time() -> None:
    """As the first step's do, beside the evaluation before it: `take` finds them finished and waits for nothing."""

    async def main() -> None:
        clock = Clock()
        actor = BufferActor(BufferConfig(episodes_per_step=2), num_rows=8, seed=0, now=clock, put=id)

        async def play(seconds: float, num_actions: int) -> None:
            tickets = [await actor.claim("a"), await actor.claim("a")]
            clock.now_s += seconds
            for ticket in tickets:
                assert isinstance(ticket, Ticket)
                await actor.add(ticket, [sub_trace_of(ticket, 90, num_actions)], EpisodeStats(0.0))

        await play(seconds=20.0, num_actions=50)
        clock.now_s += 30.0  # the evaluation continues
        assert (await actor.status()).tokens_per_s == pytest.approx(100 / 20)
        batch = await actor.take()
        assert batch.tokens_per_s == pytest.approx(100 / 20)
        clock.now_s += 60.0  # training; a synchronous run plays no episodes meanwhile
        await actor.release(batch.step)
        await play(seconds=10.0, num_actions=40)
        assert (await actor.take()).tokens_per_s == pytest.approx(80 / 10)

    asyncio.run(main())


def test_episodes_that_run_beside_the_training_count_that_time() -> None:
    async def main() -> None:
        clock = Clock()
        actor = BufferActor(BufferConfig(episodes_per_step=1, slots=2, window=2), num_rows=8, seed=0, now=clock, put=id)
        one, two = await actor.claim("a"), await actor.claim("b")
        assert one is not None
        assert two is not None
        clock.now_s += 5.0
        await actor.add(one, [sub_trace_of(one, 9, 9)], EpisodeStats(0.0))
        batch = await actor.take()
        clock.now_s += 5.0
        await actor.release(batch.step)
        await actor.add(two, [sub_trace_of(two, 9, 7)], EpisodeStats(0.0))
        assert batch.tokens_per_s == pytest.approx(9 / 5)
        assert (await actor.take()).tokens_per_s == pytest.approx(7 / 5)

    asyncio.run(main())
