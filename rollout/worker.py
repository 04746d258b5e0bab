"""The rollout worker: an asynchronous Ray actor that plays many episodes concurrently.

    consumes  tickets of the buffer (training) or row numbers (evaluation, demonstrations)
    produces  sub-traces by reference with their statistics, or failed tickets
    waits for the engines, the sandboxes, and a free slot of the buffer

An error in one episode is recorded as that episode's failure; the other episodes continue.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from buffer.store import Ticket
from buffer.tasks import TaskRow
from buffer.trace import cut
from buffer.types import Episode, EpisodeStats, Status, SubTrace, SubTraceKind, TurnKind
from machine.failures import reason
from machine.stacks import listen
from rollout.agents.player import Attempt, Sampled, Sampler
from rollout.agents.script import ScriptedSampler
from rollout.config import RolloutConfig
from rollout.engines.client import EngineUnreachable
from rollout.engines.group import EngineGroup
from rollout.engines.router import EngineRouter, Lease
from rollout.environment import Demonstrator, Environment, require_kind
from rollout.rendering.factory import make_renderer
from rollout.rendering.templates import end_ids
from rollout.sandbox.interface import SandboxPool
from rollout.seeds import Domain, turn_seed
from rollout.task import Task

STOP_TIMEOUT_S = 10.0  # for lanes to release their sandboxes
UNREACHABLE_S = 1.0  # pause after an episode that lost its engine
EVAL_ATTEMPTS = 3  # an evaluation episode that fails is played again


def worker_name(number: int) -> str:
    """Return the name under which a rollout worker claims tickets."""
    return f"rollout-{number}"


@dataclass(frozen=True)
class RolloutSettings:
    """Arguments that a rollout worker is constructed from."""

    name: str
    config: RolloutConfig
    task: Task
    model_folder: str  # contains the tokenizer
    template: str
    engines: EngineGroup
    seed: int


@dataclass(frozen=True)
class Played:
    """The result of one episode for the caller."""

    row: int
    stats: EpisodeStats
    sub_traces: tuple[SubTrace, ...] = field(repr=False, default=())


class Tickets(Protocol):
    """What a worker plays, and where it tells how that ended: `buffer.handle.BufferHandle`."""

    async def claim(self, worker: str) -> Ticket | None:
        """Return a ticket; None: ask again."""

    async def add(self, ticket: Ticket, sub_traces: Sequence[SubTrace], stats: EpisodeStats) -> bool:
        """Hand in a finished episode."""

    async def fail(self, ticket: Ticket, reason: str, trace: str) -> bool:
        """Hand back the ticket of an episode that infrastructure broke."""

    async def hand_back(self, ticket: Ticket) -> bool:
        """Hand back the ticket of an episode that lost its engine."""


class EngineSampler:
    """Generates the policy's turns with an SGLang engine."""

    def __init__(self, engine: Lease, stop_ids: Iterable[int], seed_of_turn: Callable[[int], int]) -> None:
        self._engine = engine
        self._stop_ids = sorted(stop_ids)
        self._seed_of_turn = seed_of_turn
        self._num_turns = 0  # requested
        self.waited_s = 0.0  # total wait for the engine, over all turns

    async def sample(self, prompt_ids: list[int], max_tokens: int, kind: TurnKind) -> Sampled:
        began = time.monotonic()
        seed = self._seed_of_turn(self._num_turns)
        self._num_turns += 1
        sampled = await self._engine.generate(prompt_ids, max_tokens, self._stop_ids, seed=seed)
        self.waited_s += time.monotonic() - began
        return sampled


def stats_of(episode: Episode, sub_traces: Sequence[SubTrace], duration_s: float, engine_s: float) -> EpisodeStats:
    """Return the statistics of one episode, from which metrics are computed."""
    return EpisodeStats(
        reward=episode.reward,
        row=episode.row,
        truncated=episode.status is Status.TRUNCATED,
        num_turns=len(episode.turns),
        num_compactions=sum(turn.kind is TurnKind.SUMMARY for turn in episode.turns),
        num_sub_traces=len(sub_traces),
        compacted=any(s.kind is SubTraceKind.COMPACTED for s in sub_traces),
        num_sampled=sum(s.num_actions for s in sub_traces),
        prompt_tokens=episode.prompt_tokens,
        duration_s=duration_s,
        engine_s=engine_s,
    )


class RolloutWorker:
    """Plays episodes until `stop` is called."""

    def __init__(self, settings: RolloutSettings, train_rows: Sequence[TaskRow], eval_rows: Sequence[TaskRow]) -> None:
        listen()
        self.settings = settings
        self._train_rows = train_rows
        self._eval_rows = eval_rows
        self._stopping = False
        self._lanes: list[asyncio.Task[None]] = []
        self._pool: SandboxPool | None = None
        self._engines: EngineRouter | None = None
        self._ended = 0  # attempts at an episode that did not lose their engine, failed ones included

    async def start(self) -> None:
        """Load the tokenizer, make the player, and open the engines' clients and the sandboxes.

        ValueError: the player does not support these settings.
        """
        from transformers import AutoTokenizer  # takes seconds to import

        from rollout.sandbox.factory import make_pool

        s = self.settings
        tokenizer = AutoTokenizer.from_pretrained(s.model_folder)
        known = range(s.engines.vocab_size)  # a model's configuration may name ids outside the vocabulary
        self._renderer = make_renderer(tokenizer, s.template, [i for i in end_ids(Path(s.model_folder)) if i in known])
        self._player = s.task.player(self._renderer, s.config)
        self._engines = s.engines.router()
        self._pool = make_pool(s.config.sandbox)  # in the event loop's thread: sandboxes end when their thread ends

    @contextlib.asynccontextmanager
    async def _sampler(self, domain: Domain, number: int, attempt: int) -> AsyncIterator[Sampler]:
        """Yield a sampler that holds one engine for all turns of an episode."""
        assert self._engines is not None, "start() comes first"
        seed_of_turn = functools.partial(turn_seed, self.settings.seed, domain, number)
        async with self._engines.lease(number, attempt) as engine:
            yield EngineSampler(engine, self._renderer.stop_ids, seed_of_turn)

    async def _play(self, row: TaskRow, index: int, sampler: Sampler, name: str) -> Played:
        began = time.monotonic()
        assert self._pool is not None, "start() comes first"
        sandbox, ended = await self._pool.acquire(), 1
        try:
            environment = self.settings.task.environment(row, sandbox)
            require_kind(environment, Environment, f"row {row.id!r}: its environment")
            episode = await self._player.play(Attempt(name, row, index, environment, sampler))
        except EngineUnreachable:
            ended = 0  # no progress: the episode is played again, without a limit
            raise
        finally:
            self._ended += ended
            await self._pool.release(sandbox)
        sub_traces = cut(episode)
        engine_s = sampler.waited_s if isinstance(sampler, EngineSampler) else 0.0
        return Played(index, stats_of(episode, sub_traces, time.monotonic() - began, engine_s), sub_traces)

    async def set_engines(self, urls: Sequence[str]) -> None:
        """Replace the engines by those at `urls`. Episodes of an engine that is left out are played again."""
        assert self._engines is not None, "start() comes first"
        await self._engines.use(urls)

    async def progress(self) -> int:
        """Return a counter that grows with each engine answer and each ended episode."""
        return self._ended + (self._engines.answered if self._engines else 0)

    async def run(self, buffer: Tickets) -> None:
        """Play tickets of the buffer, `episodes_in_flight` at a time, until `stop`."""
        self._lanes = [asyncio.create_task(self._lane(buffer)) for _ in range(self.settings.config.episodes_in_flight)]
        try:
            await asyncio.gather(*self._lanes)
        except asyncio.CancelledError:
            if not self._stopping:
                raise

    async def _lane(self, buffer: Tickets) -> None:
        s = self.settings
        while not self._stopping:
            ticket = await buffer.claim(s.name)
            if ticket is None:
                continue
            name = ticket.episode_id
            try:
                async with self._sampler(Domain.train, ticket.number, ticket.attempt) as sampler:
                    played = await self._play(self._train_rows[ticket.row], ticket.row, sampler, name)
            except EngineUnreachable:
                await buffer.hand_back(ticket)
                await asyncio.sleep(UNREACHABLE_S)
                continue
            except Exception as error:  # noqa: BLE001 (an episode's failure is data)
                await buffer.fail(ticket, reason(error), traceback.format_exc())
                continue
            await buffer.add(ticket, played.sub_traces, played.stats)

    async def evaluate(self, indices: Sequence[int], keep: int) -> list[Played]:
        """Play held-out rows with training's settings; the first `keep` results include their sub-traces."""
        gate = asyncio.Semaphore(self.settings.config.episodes_in_flight)

        async def one(place: int, index: int) -> Played:
            async with gate:
                row = self._eval_rows[index]
                num_failures, attempts = 0, itertools.count()
                while True:
                    try:
                        async with self._sampler(Domain.eval, index, next(attempts)) as sampler:
                            played = await self._play(row, index, sampler, f"eval-{index}")
                        return played if place < keep else Played(index, played.stats)
                    except EngineUnreachable:
                        await asyncio.sleep(UNREACHABLE_S)
                    except Exception as error:  # noqa: BLE001 (raised again with its row, as a RuntimeError)
                        num_failures += 1
                        if num_failures == EVAL_ATTEMPTS:
                            raise _failed(f"evaluation row {row.id!r} failed {EVAL_ATTEMPTS} times", error) from None

        return list(await asyncio.gather(*(one(place, index) for place, index in enumerate(indices))))

    async def demonstrate(self, indices: Sequence[int], progress: float) -> list[Played]:
        """Play training rows from the task's script, in the same loop and sandbox as the policy."""
        s = self.settings
        found = []
        for index in indices:
            row = self._train_rows[index]
            try:
                script = s.task.demonstrate(row, random.Random(f"{s.seed} {index}"), progress)
                require_kind(script, Demonstrator, f"row {row.id!r}: its demonstration")
                sampler = ScriptedSampler(script, self._renderer, f"row {row.id!r}")
                found.append(await self._play(row, index, sampler, f"demonstration-{index}"))
            except Exception as error:  # noqa: BLE001 (as above)
                raise _failed(f"the demonstration of row {row.id!r} failed", error) from None
        return found

    async def stop(self) -> None:
        """End the episodes and close sandboxes and clients."""
        self._stopping = True
        for lane in self._lanes:
            lane.cancel()
        if self._lanes:
            await asyncio.wait(self._lanes, timeout=STOP_TIMEOUT_S)
        if self._engines is not None:
            await self._engines.close()
        if self._pool is not None:
            await self._pool.close()


def _failed(what: str, error: Exception) -> RuntimeError:
    """Return an error that the driver can unpickle even if it lacks the class of the original error."""
    failure = RuntimeError(f"{what}: {reason(error)}")
    failure.add_note("".join(traceback.format_exception(error)))
    return failure
