"""Seconds of a step, by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the time of each phase since its last `restart`; `on_phase` is told the name of each one that begins."""

    def __init__(self) -> None:
        self.on_phase: Callable[[str], None] = lambda name: None
        self.restart()

    def restart(self) -> None:
        """Begin a step: no phase has taken any time."""
        self._began = time.perf_counter()
        self._spent_s: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`."""
        self.on_phase(name)
        began = time.perf_counter()
        yield
        self._spent_s[name] = self._spent_s.get(name, 0.0) + time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        """Return `time/<phase>_s`, `time/step_s` since the restart, and `time/other_s`, which is in no phase."""
        total = time.perf_counter() - self._began
        found = {f"time/{name}_s": seconds for name, seconds in self._spent_s.items()}
        return found | {"time/step_s": total, "time/other_s": total - sum(self._spent_s.values())}
