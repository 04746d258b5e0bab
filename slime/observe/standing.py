"""The progress of a run, as text for its last line and as a file for launchers and `slime status`."""

from __future__ import annotations

import json
import time
from enum import Enum
from pathlib import Path
from typing import Any

from slime import checkpoint

STATUS_FILE, CONFIG_FILE = "status.json", "config.yaml"


class State(str, Enum):
    """The state of a run. A run that was killed stays `running`, but no process holds its lock."""

    running = "running"
    finished = "finished"
    continued = "to be continued"  # ended by a launcher's signal; the launcher starts the same command again
    stopped = "stopped"  # by a user
    failed = "failed"


class Standing:
    """The progress of a run. It writes no file for a run that has not written its configuration yet."""

    def __init__(self, run_dir: Path, step: int, num_steps: int) -> None:
        """Describe a run whose last completed step is `step`."""
        self._run_dir, self._num_steps = run_dir, num_steps
        self.step = step

    def __str__(self) -> str:
        found = checkpoint.steps(self._run_dir)
        saved = f"checkpoint of step {found[-1]}" if found else "no checkpoint yet"
        how = "the same command goes on from there" if found else "the same command begins anew"
        return f"after step {self.step} of {self._num_steps}; {saved}: {how}"

    def write(self, state: State, reason: str = "") -> None:
        """Write the state of the run, if it has begun. OSError: the folder can't be written to."""
        if not (self._run_dir / CONFIG_FILE).is_file():
            return
        found = checkpoint.steps(self._run_dir)
        status = {
            "state": state.value,
            "step": self.step,
            "steps": self._num_steps,
            "checkpoint": found[-1] if found else None,
            "reason": reason,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        part = self._run_dir / f"{STATUS_FILE}.part"
        part.write_text(json.dumps(status) + "\n")
        part.replace(self._run_dir / STATUS_FILE)


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return what `Standing.write` wrote last, or {} if there is nothing to read."""
    try:
        found: dict[str, Any] = json.loads((run_dir / STATUS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found
