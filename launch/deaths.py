"""Detection of deaths: Ray's own processes, every watched actor, and the processes that these actors own.

    watch("policy rank 0", actor)         where processes are made; `effect` says what its death means for the run
    forget([actor])                       before an actor is stopped on purpose

`DeathWatch` is polled by two threads of the supervisor (launch/supervisor.py).
"""

from __future__ import annotations

import contextlib
import re
import socket
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from machine.actors import handle
from machine.failures import ending

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray._private.node import Node
    from ray.actor import ActorHandle

W = TypeVar("W")

ANSWER_TIMEOUT_S = 0.5  # for an answer that is already there
KNOCK_TIMEOUT_S = 5.0
MAX_REFUSED = 3  # consecutive refused connections to the head of a joined cluster
HEAD = {"raylet": "Ray's raylet", "gcs_server": "Ray's head (gcs_server)"}
# Ray reports the exit code of a worker that exits by itself, and writes the signal of a crash to the worker's log.
EXIT_CODE = re.compile(r"exit code (\d+)")
CRASHED = re.compile(r"^\*\*\* (SIG[A-Z]+) received", re.MULTILINE)


class Effect(Enum):
    """What the death of a process means for a run that can recover from it. Otherwise every death ends the run."""

    END = "the run ends"
    REPLACE = "another process takes its place while training goes on"
    RESTART = "all training roles start again from the newest checkpoint"


class ProcessDied(RuntimeError):
    """A process of the run has ended. The message names the process, how it ended and its log."""

    def __init__(self, ending: str, log: Path | str | None, *, effect: Effect = Effect.END, actor_id: str = "") -> None:
        super().__init__(f"{ending}; log: {log}" if log else ending)
        self.log = Path(log) if log else None
        self.effect = effect
        self.actor_id = actor_id  # of the watched actor; "": a process of Ray


@dataclass(frozen=True)
class _Watched:
    name: str
    ended: ObjectRef[str] | None  # how the actor's own process ended, "" if it was stopped; None: it has no process
    log: str  # log of the actor's own process
    effect: Effect = Effect.END
    actor: Callable[[], Any] = lambda: None  # its handle, which this must not keep alive


_watched: dict[str, _Watched] = {}  # by actor id


def watch(
    name: str,
    actor: ActorHandle[W] | type[W],
    ended: ObjectRef[str] | None = None,
    log: str = "",
    *,
    effect: Effect = Effect.END,
) -> ActorHandle[W]:
    """Register an actor whose death has an effect on the run, and return it.

    If the actor owns a process, e.g. an engine, the reference `ended` resolves to how that process ended, and `log` is
    its log.
    """
    found = handle(actor)
    _watched[actor_id(found)] = _Watched(name, ended, log, effect, weakref.ref(found))
    return found


def actor_id(actor: ActorHandle[Any]) -> str:
    """Return the id by which a death names its actor (`ProcessDied.actor_id`)."""
    return str(actor._actor_id.hex())


def forget(actors: Sequence[ActorHandle[Any]]) -> None:
    """Stop watching actors that are about to be stopped."""
    for actor in actors:
        _watched.pop(actor_id(actor), None)


def watched_actors() -> dict[str, ActorHandle[Any]]:
    """Return the handles of the actors that are watched, by name."""
    found = {one.name: one.actor() for one in list(_watched.values())}
    return {name: actor for name, actor in found.items() if actor is not None}


def forget_all() -> None:
    """Stop watching."""
    _watched.clear()


def any_watched() -> bool:
    """Return whether an actor is watched."""
    return bool(_watched)


class DeathWatch:
    """Looks for processes of the run that have ended. Each actor's death is reported once."""

    def __init__(self) -> None:
        self._refused = 0
        self._dead: dict[str, Any] = {}  # dead actors, as reported by Ray's head

    def ask(self) -> None:
        """Request the dead actors from Ray's head. This may block for long if the head does not answer."""
        import ray
        from ray._private import state  # no public call answers without Ray's dashboard

        if ray.is_initialized():
            job = ray._private.worker.global_worker.current_job_id
            with contextlib.suppress(ray.exceptions.RayError):
                self._dead = state.state.actor_table(None, job, "DEAD")

    def look(self) -> ProcessDied | None:
        """Return the next death. Ray's own processes come first: if they die, all others die, too."""
        import ray

        if not ray.is_initialized():
            return None
        found = self._dead_head() or self._dead_process() or self._dead_actor()
        if found is not None:
            _watched.pop(found.actor_id, None)
        return found

    def _dead_head(self) -> ProcessDied | None:
        node = own_node()
        if node is None:
            return None
        for kind, process in node.dead_processes():
            if kind in HEAD:
                log = Path(node.get_logs_dir_path()) / f"{kind}.out"
                return ProcessDied(f"{HEAD[kind]} (pid {process.pid}) {ending(process.returncode)}", log)
        if node.head:
            return None
        self._refused = self._refused + 1 if _refuses(node.gcs_address) else 0
        if self._refused < MAX_REFUSED:
            return None
        return ProcessDied(f"Ray's head (gcs_server) at {node.gcs_address} has ended: it refuses connections", None)

    def _dead_process(self) -> ProcessDied | None:
        import ray

        by_ref = {one.ended: (key, one) for key, one in list(_watched.items()) if one.ended is not None}
        ended, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0) if by_ref else ((), ())
        for ref in ended:
            key, one = by_ref[ref]
            with contextlib.suppress(ray.exceptions.RayError):  # its actor has died
                if how := ray.get(ref, timeout=ANSWER_TIMEOUT_S):
                    return ProcessDied(f"{one.name} {how}", one.log, effect=one.effect, actor_id=key)
        return None

    def _dead_actor(self) -> ProcessDied | None:
        for key, actor in self._dead.items():
            one = _watched.get(key)
            if one is None or actor["DeathCause"].HasField("creation_task_failure_context"):
                continue  # a constructor's error is reported by the code that waits for the actor
            name = one.name if one.ended is None else f"the process that owns {one.name}"
            address = actor["Address"]["IPAddress"]
            log = _log_of(actor["Pid"], address)
            how = f"{name} (pid {actor['Pid']} on {address}) {_how(actor['DeathCause'], log)}"
            return ProcessDied(how, log, effect=one.effect, actor_id=key)
        return None


def own_node() -> Node | None:
    """Return what this process has started of Ray, or has joined; None before and after."""
    import ray

    return ray._private.worker._global_node


def _refuses(address: str) -> bool:
    """Return whether HOST:PORT refuses a connection. No answer counts as False: the network may be slow."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _log_of(pid: int, address: str) -> Path | None:
    """Return the stderr log of a Ray worker, or None if it ran on another machine."""
    node = own_node()
    if node is None or node.node_ip_address != address:
        return None
    return next(Path(node.get_logs_dir_path()).glob(f"worker-*-{pid}.err"), None)


def _how(cause: Any, log: Path | None) -> str:
    """Describe how a Ray worker ended."""
    if cause.HasField("oom_context"):
        return f"was killed: {' '.join(cause.oom_context.error_message.split())}"
    if log is not None and (crashed := CRASHED.search(log.read_text(errors="replace"))):
        return f"crashed by {crashed[1]}"
    if found := EXIT_CODE.search(cause.actor_died_error_context.error_message):
        return ending(int(found[1]))
    return "was killed, e.g. by the out-of-memory killer"
