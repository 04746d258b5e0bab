"""The data buffer as the driver sees it: typed calls of its actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from buffer.store import Counts
from buffer.types import Batch

POLL_S = 0.5
CALL_TIMEOUT_S = 60.0  # for an answer that waits for no episode


class BufferHandle:
    """Calls a `BufferActor`. Errors of the actor are raised here."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor  # what rollout workers are given: they call it without waiting in a thread

    def take(self, waiting: Callable[[Counts], None]) -> Batch:
        """Return the next step's batch (`BufferActor.take`); call `waiting` twice a second until it is there."""
        asked = self.actor.take.remote()
        while not ray.wait([asked], timeout=POLL_S)[0]:
            waiting(ray.get(self.actor.status.remote(), timeout=CALL_TIMEOUT_S))
        batch: Batch = ray.get(asked, timeout=CALL_TIMEOUT_S)
        return batch

    def release(self, step: int) -> None:
        """Free the slots of a batch."""
        ray.get(self.actor.release.remote(step), timeout=CALL_TIMEOUT_S)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the buffer."""
        state: dict[str, Any] = ray.get(self.actor.state_dict.remote(), timeout=CALL_TIMEOUT_S)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ray.get(self.actor.load_state_dict.remote(state), timeout=CALL_TIMEOUT_S)
