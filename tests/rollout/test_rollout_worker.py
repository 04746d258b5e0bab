"""Rollout workers: an episode that raises, and the episodes in flight when a worker is stopped."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from agents import Player, World, settings_of
from agents import play as play_alone

from buffer.store import Ticket
from buffer.trace import cut
from buffer.types import EpisodeStats
from rollout.engines.client import EngineUnreachable
from rollout.environment import Demonstrator
from rollout.worker import EVAL_ATTEMPTS, Played, RolloutWorker, stats_of

LIMIT_S = 60.0


class Odd(Exception):
    """An error that can't be rebuilt from its arguments, so that no other process can unpickle it."""

    def __init__(self, number: int, letter: str) -> None:
        super().__init__(f"odd {number} {letter}")


class Script(Demonstrator):
    """Is never asked."""

    def action(self) -> str:
        raise NotImplementedError

    def summary(self) -> str:
        raise NotImplementedError


class Buffer:
    """Hands out one ticket and then none; records failures."""

    def __init__(self) -> None:
        self.tickets = [Ticket(4, 0, 0)]
        self.failures: list[tuple[Any, ...]] = []
        self.idle = asyncio.Event()

    async def claim(self, worker: str) -> Ticket | None:
        if self.tickets:
            return self.tickets.pop()
        self.idle.set()
        await asyncio.sleep(LIMIT_S)
        return None

    async def fail(self, *told: Any) -> bool:
        self.failures.append(told)
        return True

    async def hand_back(self, ticket: Ticket) -> bool:
        self.failures.append(("handed back", ticket))
        return True

    async def add(self, *told: Any) -> bool:
        raise AssertionError("no episode succeeds here")


def worker(play: Any) -> RolloutWorker:
    config = SimpleNamespace(episodes_in_flight=3)
    task = SimpleNamespace(demonstrate=lambda row, rng, progress: Script())
    rows: Any = [SimpleNamespace(id="a")]
    settings: Any = SimpleNamespace(name="rollout-0", config=config, task=task, seed=0)
    made = RolloutWorker(settings, rows, rows)
    made._play = play  # type: ignore[method-assign]
    made._sampler = lambda *of: nullcontext()  # type: ignore[method-assign, assignment]
    made._renderer = None  # type: ignore[assignment]
    return made


async def breaks(*_: object) -> Any:
    raise Odd(3, "b")


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda w: w.evaluate([0], 1), f"evaluation row 'a' failed {EVAL_ATTEMPTS} times: "),
        (lambda w: w.demonstrate([0], 0.5), "the demonstration of row 'a' failed: "),
    ],
)
def test_an_episode_that_raises_is_told_with_its_row_and_place(call: Any, what: str) -> None:
    """Every process can unpickle the error, regardless of the original one."""
    with pytest.raises(RuntimeError) as caught:
        asyncio.run(call(worker(breaks)))
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error).startswith(f"{what}Odd: odd 3 b (test_rollout_worker.py:")
    assert 'raise Odd(3, "b")' in error.__notes__[0]


def test_a_failed_episode_is_one_line_and_its_trace() -> None:
    async def main() -> list[tuple[Any, ...]]:
        buffer, made = Buffer(), worker(breaks)
        running = asyncio.create_task(made.run(buffer))
        await asyncio.wait_for(buffer.idle.wait(), LIMIT_S)
        await made.stop()
        await asyncio.wait_for(running, LIMIT_S)  # `run` ends without an error
        return buffer.failures

    ((ticket, reason, trace),) = asyncio.run(main())
    assert ticket == Ticket(4, 0, 0)
    assert reason.startswith("Odd: odd 3 b (test_rollout_worker.py:")
    assert "\n" not in reason
    assert 'raise Odd(3, "b")' in trace


def test_an_episode_that_loses_its_engine_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.worker.UNREACHABLE_S", 0.0)

    async def main() -> list[tuple[Any, ...]]:
        async def loses(*_: object) -> Any:
            raise EngineUnreachable("gone")

        buffer, made = Buffer(), worker(loses)
        running = asyncio.create_task(made.run(buffer))
        await asyncio.wait_for(buffer.idle.wait(), LIMIT_S)
        await made.stop()
        await asyncio.wait_for(running, LIMIT_S)
        return buffer.failures

    assert asyncio.run(main()) == [("handed back", Ticket(4, 0, 0))]


def test_an_evaluation_plays_again_what_lost_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.worker.UNREACHABLE_S", 0.0)
    lost = itertools.repeat(EngineUnreachable("gone"), EVAL_ATTEMPTS + 1)
    found = Played(0, EpisodeStats(1.0))

    async def play(*_: object) -> Any:
        if (error := next(lost, None)) is not None:
            raise error
        return found

    assert asyncio.run(worker(play).evaluate([0], 1)) == [found]


@pytest.mark.parametrize(("error", "progress"), [(EngineUnreachable("gone"), 0), (Odd(1, "b"), 1)])
def test_an_episode_without_its_engine_is_no_progress(
    monkeypatch: pytest.MonkeyPatch, error: Exception, progress: int
) -> None:
    """Otherwise an evaluation whose engine can't be reached would never be too long."""
    monkeypatch.setattr("rollout.worker.require_kind", lambda *_: None)

    async def acquire() -> None:
        return None

    async def release(sandbox: None) -> None:
        return None

    async def play(attempt: Any) -> Any:
        raise error

    async def main() -> int:
        made = worker(None)
        del made._play
        made.settings.task.environment = lambda row, sandbox: None  # type: ignore[method-assign, assignment, return-value]
        made._pool = SimpleNamespace(acquire=acquire, release=release)
        made._player = SimpleNamespace(play=play)
        with pytest.raises(type(error)):
            await made._play(SimpleNamespace(id="a"), 0, None, "a")  # type: ignore[arg-type]
        return await made.progress()

    assert asyncio.run(main()) == progress


def test_stopping_ends_episodes_before_what_they_stand_on() -> None:
    """No episode reports a failure of a sandbox or a connection that `stop` has closed."""
    events: list[str] = []

    async def main() -> list[tuple[Any, ...]]:
        buffer, playing = Buffer(), asyncio.Event()

        async def play(*_: object) -> Any:
            try:
                playing.set()
                await asyncio.sleep(LIMIT_S)
            finally:
                events.append("episode")

        made = worker(play)

        async def close() -> None:
            events.append("pool")

        made._pool = SimpleNamespace(close=close)
        running = asyncio.create_task(made.run(buffer))
        await asyncio.wait_for(playing.wait(), LIMIT_S)
        await made.stop()
        await asyncio.wait_for(running, LIMIT_S)
        return buffer.failures

    assert asyncio.run(main()) == []
    assert events == ["episode", "pool"]


def test_the_numbers_of_an_episode_by_hand() -> None:
    """Two actions, a summary and a last action, of two tokens each, after a task of five."""
    world = World("uuu", "k" * 5, "k" * 25)
    episode = play_alone(Player("x", "y", "s", "z"), world, settings_of(keep_steps=0))
    assert stats_of(episode, cut(episode), duration_s=2.0, engine_s=0.5) == EpisodeStats(
        reward=0.5,
        row=3,
        truncated=False,
        num_turns=4,
        num_compactions=1,
        num_sub_traces=2,
        compacted=True,
        num_sampled=8,
        prompt_tokens=5,
        duration_s=2.0,
        engine_s=0.5,
    )
