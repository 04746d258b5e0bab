"""The loop's answer to deaths: replace engines and rollout workers, start the training roles again.

The supervisor's thread finds a death and puts it into a queue (`Supervisor.recoverable`). The main thread handles the
queue in `Recovery.check`, which the loop calls wherever it waits for episodes, and before it publishes weights.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol

from launch.deaths import Effect, ProcessDied


class RanksLost(Exception):
    """A training process has died, so every training role must start again from the newest checkpoint."""

    def __init__(self, death: ProcessDied) -> None:
        super().__init__(str(death))
        self.death = death


class Replacer(Protocol):
    """Replaces dead processes of one kind."""

    def replaces(self, death: ProcessDied) -> bool:
        """Return whether the dead process is of this kind."""

    def replace(self, death: ProcessDied) -> None:
        """Begin to replace a dead process, without a wait for its successor."""

    def advance(self) -> None:
        """Let successors that are ready join the run. RuntimeError: one could not start."""


class Recovery:
    """Handles the deaths of a run's processes in the main thread."""

    def __init__(self, deaths: deque[ProcessDied] | None = None, replacers: Sequence[Replacer] = ()) -> None:
        """Prepare the recovery. `deaths`: the queue of the supervisor; None: every death ends the run."""
        self._deaths: deque[ProcessDied] = deque() if deaths is None else deaths
        self._replacers = list(replacers)
        self._counts = Counter({"recovery/restarts": 0})

    def check(self) -> None:
        """Handle every death that was found and let ready successors join.

        RanksLost: a training process died. RuntimeError: a process can't be replaced.
        """
        while self._deaths:
            death = self._deaths[0]
            if death.effect is Effect.RESTART:
                raise RanksLost(self._deaths.popleft())
            replacer = next((one for one in self._replacers if one.replaces(death)), None)
            if replacer is None:
                raise RuntimeError(f"nothing replaces it: {death}")
            replacer.replace(death)
            self._deaths.popleft()
        for one in self._replacers:
            one.advance()

    def count(self, name: str) -> None:
        """Count a recovery under the name of its metric."""
        self._counts[name] += 1

    def metrics(self) -> dict[str, float]:
        """Return the number of recoveries of each kind since this process began."""
        return {name: float(count) for name, count in self._counts.items()}
