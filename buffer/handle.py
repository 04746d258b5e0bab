"""The typed handle of the data buffer actor, for the driver and the rollout workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray

from buffer.actor import BufferActor
from buffer.store import Counts, Ticket
from buffer.types import Batch, EpisodeStats, SubTrace
from machine.actors import call

if TYPE_CHECKING:
    from ray.actor import ActorHandle

POLL_S = 0.5
CALL_TIMEOUT_S = 60.0  # for calls that do not wait for episodes


class BufferHandle:
    """A handle that calls a `BufferActor` and raises its errors in the driver."""

    def __init__(self, actor: ActorHandle[BufferActor]) -> None:
        self.actor = actor

    async def claim(self, worker: str) -> Ticket | None:
        """Return a ticket as soon as a slot is free; None: ask again (`BufferActor.claim`)."""
        return await call(self.actor, BufferActor.claim, worker)

    async def add(self, ticket: Ticket, sub_traces: Sequence[SubTrace], stats: EpisodeStats) -> bool:
        """Store a finished episode. Return False if its ticket was issued again: the episode is dropped."""
        return await call(self.actor, BufferActor.add, ticket, sub_traces, stats)

    async def fail(self, ticket: Ticket, reason: str, trace: str) -> bool:
        """Report an episode that failed outside the task. Return False if its ticket was issued again meanwhile."""
        return await call(self.actor, BufferActor.fail, ticket, reason, trace)

    async def hand_back(self, ticket: Ticket) -> bool:
        """Hand back the ticket of an episode that lost its engine. Return False if it was issued again meanwhile."""
        return await call(self.actor, BufferActor.hand_back, ticket)

    def lost(self, worker: str) -> int:
        """Reissue the tickets of a worker that has died. Return their number."""
        return ray.get(call(self.actor, BufferActor.lost, worker), timeout=CALL_TIMEOUT_S)

    def take(self, waiting: Callable[[Counts], None]) -> Batch:
        """Return the next step's batch (`BufferActor.take`). Call `waiting` every `POLL_S` until it is ready."""
        asked = call(self.actor, BufferActor.take)
        while not ray.wait([asked], timeout=POLL_S)[0]:
            waiting(ray.get(call(self.actor, BufferActor.status), timeout=CALL_TIMEOUT_S))
        return ray.get(asked, timeout=CALL_TIMEOUT_S)

    def release(self, step: int) -> None:
        """Free the slots of a batch."""
        ray.get(call(self.actor, BufferActor.release, step), timeout=CALL_TIMEOUT_S)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the buffer that a checkpoint stores."""
        return ray.get(call(self.actor, BufferActor.state_dict), timeout=CALL_TIMEOUT_S)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        ray.get(call(self.actor, BufferActor.load_state_dict, state), timeout=CALL_TIMEOUT_S)
