"""Make the run in a folder save its state, and wait for its end: `python -m launch.kubernetes.stop FOLDER SECONDS`.

The hook of every pod of a RayJob that is told to end. A run there is a child of Ray, to which nobody passes SIGTERM
on, and all pods are told at the same time: the pod of the run sends the signal, and the others keep their ranks alive
until the run has ended.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil

from launch.lock import SILENT_S, run_holder

POLL_S = 0.5


def stop(run_dir: Path, limit_s: float) -> None:
    """Return when no run has the folder any more, or after `limit_s`.

    A run of another pod is over when its lock is gone or its count stands still.
    """
    deadline = time.monotonic() + limit_s
    told: psutil.Process | None = None
    seen, seen_s = None, time.monotonic()
    while time.monotonic() < deadline:
        holder = run_holder(run_dir)
        if told is not None:
            if _has_ended(told):
                return
        elif holder is None:
            return
        elif holder.host == socket.gethostname():
            try:
                told = psutil.Process(holder.pid)
                os.kill(told.pid, signal.SIGTERM)
            except (psutil.NoSuchProcess, ProcessLookupError):
                return
        if holder != seen:
            seen, seen_s = holder, time.monotonic()
        elif told is None and time.monotonic() > seen_s + SILENT_S:
            return
        time.sleep(POLL_S)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two
        return True


if __name__ == "__main__":
    stop(Path(sys.argv[1]), float(sys.argv[2]))
