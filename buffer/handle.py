"""The driver's typed handle of the data buffer actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from buffer.store import Counts
from buffer.types import Batch

POLL_S = 0.5
CALL_TIMEOUT_S = 60.0  # for calls that do not wait for episodes


class BufferHandle:
    """A handle that calls a `BufferActor` and raises its errors in the driver."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor  # passed to rollout workers, which call it asynchronously

    def take(self, waiting: Callable[[Counts], None]) -> Batch:
        """Return the next step's batch (`BufferActor.take`). Call `waiting` every `POLL_S` until it is ready."""
        asked = self.actor.take.remote()
        while not ray.wait([asked], timeout=POLL_S)[0]:
            waiting(ray.get(self.actor.status.remote(), timeout=CALL_TIMEOUT_S))
        batch: Batch = ray.get(asked, timeout=CALL_TIMEOUT_S)
        return batch

    def release(self, step: int) -> None:
        """Free the slots of a batch."""
        ray.get(self.actor.release.remote(step), timeout=CALL_TIMEOUT_S)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the buffer that a checkpoint stores."""
        state: dict[str, Any] = ray.get(self.actor.state_dict.remote(), timeout=CALL_TIMEOUT_S)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        ray.get(self.actor.load_state_dict.remote(state), timeout=CALL_TIMEOUT_S)
