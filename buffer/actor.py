"""The data buffer as an asynchronous actor: a thin shell around buffer.store that adds a clock and waiting.

`BufferActor` is a plain class; its users wrap it with `ray.remote`. It puts finished sub-traces into Ray's store, so
that they outlive the worker that played them, and keeps lengths, versions and references. All methods run on one event
loop and do not await while they change the store, so no lock is needed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from buffer.config import BufferConfig
from buffer.store import Counts, Store, Ticket
from buffer.throughput import Throughput
from buffer.types import Batch, EpisodeStats, SubTrace, SubTraceInfo
from machine.stacks import listen

_POLL_S = 1.0  # interval of the check for overdue tickets while a caller waits


class BufferActor:
    """Hands tickets to rollout workers and batches to training."""

    def __init__(
        self,
        config: BufferConfig,
        num_rows: int,
        seed: int,
        *,
        now: Callable[[], float] = time.monotonic,
        put: Callable[[SubTrace], Any] = ray.put,
    ) -> None:
        listen()
        self._config = config
        self._store = Store(config, num_rows, seed)
        self._now = now  # seconds
        self._put = put
        self._poll_s = min(_POLL_S, config.claim_timeout_s)
        self._changed = asyncio.Event()
        self._deaths: dict[str, int] = {}  # worker -> number of times it was lost
        self._broken: RuntimeError | None = None  # why training can't continue
        self._throughput = Throughput()

    async def claim(self, worker: str, wait_s: float = 30.0) -> Ticket | None:
        """Return a ticket as soon as a slot is free.

        Return None after `wait_s` (the worker calls again) or if the worker was lost meanwhile. The wait is short so
        that a worker that died while it waited does not receive a ticket.
        """
        deadline_s = self._now() + wait_s
        deaths = self._deaths.get(worker, 0)
        while self._deaths.get(worker, 0) == deaths:
            self._expire()
            ticket = self._store.claim(self._now(), worker)
            self._note_running()
            if ticket is not None or self._now() >= deadline_s:
                return ticket
            await self._wait(deadline_s)
        return None

    async def add(self, ticket: Ticket, sub_traces: Sequence[SubTrace], stats: EpisodeStats) -> bool:
        """Store a finished episode. Return False and drop it if its ticket was issued again meanwhile."""
        infos = [
            SubTraceInfo(self._put(one), one.episode_id, len(one.tokens), one.num_actions, one.oldest_version)
            for one in sub_traces
        ]
        kept = self._store.add(ticket, infos, stats)
        if kept:
            self._throughput.finished(sum(info.num_actions for info in infos))
        self._notify()
        return kept

    async def fail(self, ticket: Ticket, reason: str, trace: str = "") -> bool:
        """Record an infrastructure failure of an episode. Return False if the ticket was issued again meanwhile.

        Too many failures of a ticket make `take` raise an error.
        """
        try:
            return self._store.fail(ticket, reason, trace)
        except RuntimeError as error:
            self._broken = error.with_traceback(None)
            return True
        finally:
            self._notify()

    async def hand_back(self, ticket: Ticket) -> bool:
        """Reissue the ticket of an episode that could not go on (`Store.hand_back`)."""
        known = self._store.hand_back(ticket)
        self._notify()
        return known

    async def lost(self, worker: str) -> int:
        """Reissue the tickets of a dead worker and end its pending claims. Return the number of tickets."""
        self._deaths[worker] = self._deaths.get(worker, 0) + 1
        tickets = self._store.lost(worker)
        self._notify()
        return len(tickets)

    async def take(self) -> Batch:
        """Return the next step's batch as soon as its episodes are finished.

        TimeoutError after `take_timeout_s`; it says how many episodes are missing and which workers hold them.
        RuntimeError: an episode failed too often.
        """
        deadline_s = self._now() + self._config.take_timeout_s
        while True:
            if self._broken:
                raise self._broken
            self._expire()
            batch = self._store.take()
            if batch is not None:
                now_s = self._now()
                rate = self._throughput.tokens_per_s(now_s)
                self._throughput.reset(now_s)
                return replace(batch, tokens_per_s=rate)
            if self._now() >= deadline_s:
                raise TimeoutError(self._missing())
            await self._wait(deadline_s)

    async def release(self, step: int) -> None:
        """Free the slots of a trained batch. Called when the engines have the new weights."""
        self._store.release(step)
        self._notify()

    async def status(self) -> Counts:
        """Return the counts for the live view."""
        return self._store.counts()._replace(tokens_per_s=self._throughput.tokens_per_s(self._now()))

    async def state_dict(self) -> dict[str, Any]:
        return self._store.state_dict()

    async def load_state_dict(self, state: dict[str, Any]) -> None:
        self._store.load_state_dict(state)
        self._notify()

    def _expire(self) -> None:
        if self._store.expire(self._now()):
            self._notify()

    def _note_running(self) -> None:
        self._throughput.runs(self._store.any_in_flight, self._now())

    def _notify(self) -> None:
        """Wake all waiting calls."""
        self._note_running()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, deadline_s: float) -> None:
        """Wait for a change, the deadline or the next check for overdue tickets."""
        timeout_s = min(self._poll_s, max(0.0, deadline_s - self._now()))
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    def _missing(self) -> str:
        counts = self._store.counts()
        held = ", ".join(
            f"{worker} holds {len(numbers)} (oldest ticket {numbers[0]})"
            for worker, numbers in sorted(self._store.holders().items())
        )
        size = self._config.episodes_per_prompt
        groups = f" (in whole groups of {size})" if size > 1 else ""
        return (
            f"{counts.wanted - counts.takeable} of {counts.wanted} episodes{groups} are missing after "
            f"{self._config.take_timeout_s:g} s: {held or 'no worker holds a ticket'}; "
            f"{counts.waiting} tickets wait for a worker, {counts.finished} episodes are finished"
        )
