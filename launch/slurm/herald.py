"""A step of a job that passes SIGTERM on to the job's process: `python -m launch.slurm.herald PID`.

At the start of a preemption's grace time Slurm tells the steps of a job, and its batch script only when that time is
over. This step does nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main(job: int) -> None:
    """Wait for signals until the job ends."""

    def tell(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(job, number)

    signal.signal(signal.SIGTERM, tell)
    signal.signal(signal.SIGUSR1, tell)  # --signal without B:
    while True:
        signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]))
