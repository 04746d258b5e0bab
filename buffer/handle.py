"""The typed handle of the data buffer actor, for the driver and the rollout workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import RayError

from buffer.actor import BufferActor
from buffer.store import Counts, Ticket
from buffer.types import Batch, EpisodeStats, SubTrace
from machine.actors import call
from machine.waits import answers

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

T = TypeVar("T")

POLL_S = 0.5
CALL_TIMEOUT_S = 60.0  # for calls that do not wait for episodes
WORKER_TIMEOUT_S = 600.0  # for a rollout worker's calls, many of which may come at once
NAME = "the data buffer"


class BufferHandle:
    """A handle that calls a `BufferActor` and raises its errors in the driver."""

    def __init__(self, actor: ActorHandle[BufferActor]) -> None:
        self.actor = actor

    def _get(self, asked: ObjectRef[T], what: str) -> T:
        """Return the answer of a call that waits for nothing."""
        return answers(f"buffer.{what}", {NAME: self.actor}, [asked], CALL_TIMEOUT_S)[0]

    async def _answer(self, asked: ObjectRef[T], what: str) -> T:
        """Return the answer of a rollout worker's call. TimeoutError after `WORKER_TIMEOUT_S`."""
        try:
            async with asyncio.timeout(WORKER_TIMEOUT_S):
                return await asked
        except TimeoutError as error:
            if not isinstance(error, RayError):  # else the buffer has raised it
                raise TimeoutError(f"{what}: no answer from {NAME} in {WORKER_TIMEOUT_S:g} s") from None
            raise

    async def claim(self, worker: str) -> Ticket | None:
        """Return a ticket as soon as a slot is free; None: ask again (`BufferActor.claim`)."""
        return await self._answer(call(self.actor, BufferActor.claim, worker), f"{worker}, a claim")

    async def add(self, ticket: Ticket, sub_traces: Sequence[SubTrace], stats: EpisodeStats) -> bool:
        """Store a finished episode. Return False if its ticket was issued again: the episode is dropped."""
        return await self._answer(
            call(self.actor, BufferActor.add, ticket, sub_traces, stats), f"episode {ticket.episode_id}"
        )

    async def fail(self, ticket: Ticket, reason: str, trace: str) -> bool:
        """Report an episode that failed outside the task. Return False if its ticket was issued again meanwhile."""
        return await self._answer(
            call(self.actor, BufferActor.fail, ticket, reason, trace), f"episode {ticket.episode_id}"
        )

    async def hand_back(self, ticket: Ticket) -> bool:
        """Hand back the ticket of an episode that lost its engine. Return False if it was issued again meanwhile."""
        return await self._answer(call(self.actor, BufferActor.hand_back, ticket), f"episode {ticket.episode_id}")

    def lost(self, worker: str) -> int:
        """Reissue the tickets of a worker that has died. Return their number."""
        return self._get(call(self.actor, BufferActor.lost, worker), "lost")

    def take(self, waiting: Callable[[Counts], None]) -> Batch:
        """Return the next step's batch (`BufferActor.take`). Call `waiting` every `POLL_S` until it is ready."""
        asked = call(self.actor, BufferActor.take)
        while not ray.wait([asked], timeout=POLL_S)[0]:
            waiting(self._get(call(self.actor, BufferActor.status), "status"))
        return self._get(asked, "take")

    def release(self, step: int) -> None:
        """Free the slots of a batch."""
        self._get(call(self.actor, BufferActor.release, step), "release")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the buffer that a checkpoint stores."""
        return self._get(call(self.actor, BufferActor.state_dict), "state_dict")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self._get(call(self.actor, BufferActor.load_state_dict, state), "load_state_dict")
