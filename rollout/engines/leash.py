"""A leash: runs a command that ends when the process that started it ends for any reason.

    python -m rollout.engines.leash COMMAND ARGUMENT...

Everything that the command has started ends with it. The starting process holds the write end of the leash's standard
input and never writes. When that process dies, even by SIGKILL, the pipe closes and the leash kills every descendant.
(The kernel's parent-death signal alone is not enough: it fires when the *thread* that started a process ends, and
servers are started from short-lived threads.)
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
    """Run `command` until it ends or standard input closes, kill everything it started, and exit with its exit code.

    The leash consists of two processes, a keeper and its child. Each kills everything when the other one dies: Ray
    kills the children of a worker that exits, and the parent of a half-started server must outlive the server. Both
    adopt orphans, so that they find every descendant, even one with its own process group or session, or one whose
    parent has died.
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
    os._exit(code if code >= 0 else 128 - code)  # the convention of shells


def _follow(command: list[str], keeper: int) -> int:
    """Return the exit code of the command, negative for a signal; 0 if the leash closed before the command ended."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    while child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], LEASH_INTERVAL_S)
        if os.getppid() != keeper or (readable and not os.read(sys.stdin.fileno(), 1)):
            return 0
    print(f"the server {ending(child.returncode)}", file=sys.stderr, flush=True)
    return child.returncode


if __name__ == "__main__":
    hold(sys.argv[1:])
