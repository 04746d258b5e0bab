"""A leash: runs a command that ends with the process that asked for it, however that one dies.

    python -m rollout.engines.leash COMMAND ARGUMENT...

Everything that the command has started ends with it. The asker holds the write end of the leash's standard input and
never writes; when it dies, by SIGKILL too, the pipe closes and every descendant is killed. (The kernel's parent-death
signal alone would fire when the *thread* that started a process ends, and servers are started from short-lived ones.)
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys

from machine.failures import adopt_orphans, end_descendants, ending

LEASH_INTERVAL_S = 0.2
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hold(command: list[str]) -> None:
    """Run `command` until it ends or standard input closes, end all that it has started, and exit as it did.

    The leash is two processes, a keeper and its child, and each ends everything when the other has died: Ray kills the
    children of a worker that exits, and the parent of a half-started server must not be gone before the server. Both
    adopt orphans, so that a process is found wherever it went: to a group or session of its own, or away from a parent
    that has died.
    """
    adopt_orphans()
    keeper = os.getpid()
    follower = os.fork()
    if follower:
        code = os.waitstatus_to_exitcode(os.waitpid(follower, 0)[1])
    else:
        adopt_orphans()
        code = _follow(command, keeper)
    end_descendants()
    os._exit(code if code >= 0 else 128 - code)  # as shells say it


def _follow(command: list[str], keeper: int) -> int:
    """Exit code of the command, negative for a signal; 0 when it was not awaited to its end."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    while child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], LEASH_INTERVAL_S)
        if os.getppid() != keeper or (readable and not os.read(sys.stdin.fileno(), 1)):
            return 0
    print(f"the server {ending(child.returncode)}", file=sys.stderr, flush=True)
    return child.returncode


if __name__ == "__main__":
    hold(sys.argv[1:])
