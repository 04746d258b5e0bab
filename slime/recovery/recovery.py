"""The loop's answer to deaths: replace engines and rollout workers, start the training roles again.

The supervisor's thread finds a death and puts it into a queue (`Supervisor.recoverable`). The main thread handles the
queue in `Recovery.check`, which the loop calls wherever it waits for episodes, and before it publishes weights.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol

from launch.deaths import Effect, ProcessDied

SETTLE_S = 15.0  # from the first consequence of a death to its detection; SGLang lives 6 s without its scheduler
POLL_S = 0.1
MAX_REPLACEMENTS = 3  # of one engine or rollout worker without a publication of weights in between


def limit_deaths(name: str, deaths: Sequence[str]) -> None:
    """Refuse to replace a process once more. RuntimeError: its deaths since it last worked are too many."""
    if len(deaths) > MAX_REPLACEMENTS:
        raise RuntimeError(f"{name} ended {len(deaths)} times in a row: {'; '.join(deaths)}")


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

    @property
    def joining(self) -> bool:
        """Return whether a successor waits for a publication of weights."""

    def joined(self) -> None:
        """Note a publication of weights, in which all successors that waited for it took part."""


class Recovery:
    """Handles the deaths of a run's processes in the main thread."""

    def __init__(self, deaths: deque[ProcessDied] | None = None, replacers: Sequence[Replacer] = ()) -> None:
        """Prepare the recovery. `deaths`: the queue of the supervisor; None: every death ends the run."""
        self._deaths: deque[ProcessDied] = deque() if deaths is None else deaths
        self._replacers = list(replacers)
        self._counts = Counter({"recovery/restarts": 0, "recovery/engines": 0, "recovery/workers": 0})

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

    @property
    def joining(self) -> bool:
        """Return whether a successor waits for a publication of weights."""
        return any(one.joining for one in self._replacers)

    def joined(self) -> None:
        """Note a publication of weights."""
        for one in self._replacers:
            one.joined()

    def engine_died(self) -> bool:
        """Return whether a process that can be replaced has died. Wait until its death is detected.

        Call this after an error that such a death may have led to.
        """
        deadline = time.monotonic() + SETTLE_S
        while not self._deaths and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return any(death.effect is Effect.REPLACE for death in self._deaths)

    def count(self, name: str) -> None:
        """Count a recovery under the name of its metric."""
        self._counts[name] += 1

    def metrics(self) -> dict[str, float]:
        """Return the number of recoveries of each kind since this process began."""
        return {name: float(count) for name, count in self._counts.items()}
