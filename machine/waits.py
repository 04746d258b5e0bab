"""Deadlines of waits for Ray actors: the error names both sides, and their stacks are in the run's folder.

    answers("evaluation", others, refs, limit_s)    ray.get with such an error
    overdue("evaluation", others, limit_s)          the error alone, for other waits

The driver of a run sets the folder with `keep_stacks_in`. In other processes, and in tests, the error only names.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from machine.failures import MAX_CHARACTERS
from machine.stacks import Seen, look, own_stacks, tasks

if TYPE_CHECKING:
    from ray import ObjectRef

T = TypeVar("T")

MAX_LOOKED_AT = 32  # processes of one wait
MAX_NAMED = 3  # in the message
LOOK_TIMEOUT_S = 60.0  # for all of them together
NODE_TIMEOUT_S = 30.0  # for another node's processes
TASKS_TIMEOUT_S = 5.0  # an event loop that answers later is stuck
TOLD_FILE = "overdue.txt"
_folder: Path | None = None


def keep_stacks_in(folder: Path | None) -> None:
    """Set the folder for the stacks of processes that are waited for too long; None: write none."""
    global _folder
    _folder = folder


def answers(what: str, others: Mapping[str, Any], refs: Sequence[ObjectRef[T]], limit_s: float) -> list[T]:
    """Return the answers of calls, one for each of the processes `others` (name -> actor handle).

    TimeoutError: see `overdue`. The error of a call is raised at once.
    """
    import ray

    late, deadline = list(refs), time.monotonic() + limit_s
    while late and (left_s := deadline - time.monotonic()) > 0:
        done, late = ray.wait(late, num_returns=len(late), timeout=min(1.0, left_s))
        ray.get(done, timeout=60)
    if late:
        silent = {name: actor for (name, actor), ref in zip(others.items(), refs, strict=True) if ref in late}
        raise overdue(what, silent, limit_s)
    return ray.get(list(refs), timeout=60)


def objects(what: str, refs: Sequence[ObjectRef[T]], limit_s: float) -> list[T]:
    """Return objects of Ray's store. TimeoutError: some of them did not arrive, e.g. because their node is slow."""
    import ray

    try:
        return ray.get(list(refs), timeout=limit_s)
    except ray.exceptions.GetTimeoutError:
        late = ray.wait(list(refs), num_returns=len(refs), timeout=0)[1]
        raise TimeoutError(
            f"{what}: no answer from Ray's object store for {len(late)} of {len(refs)} objects in {limit_s:g} s"
        ) from None


def numbered(name: str, actors: Sequence[T]) -> dict[str, T]:
    """Return actors by name: "engine 0", "engine 1", ..."""
    return {f"{name} {number}": actor for number, actor in enumerate(actors)}


def overdue(what: str, others: Mapping[str, Any], limit_s: float) -> TimeoutError:
    """Return the error of a wait for processes that have not answered.

    Its line names the wait, the processes, since when they are waited for, what they do now, and the folder with their
    stacks and those of this process. `others`: name -> actor handle.
    """
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - limit_s))
    names = list(others)
    who = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
    line = f"{what}: no answer from {who} in {limit_s:g} s, since {since}"
    return TimeoutError(line + sight_of(others, line))


def sight_of(others: Mapping[str, Any], line: str) -> str:
    """Write the stacks of processes and of this one into a folder, and return what to append to an error's line.

    That is what the processes do now, as far as there is room, and the folder: "; rank 1 (pid 7 on N) is in ...;
    stacks: ...". If some of them can't run, only these are named. It is "" if no folder is set. `line`: the error's
    first words.
    """
    if _folder is None:
        return ""
    folder = _folder / f"{time.strftime('%Y%m%d_%H%M%S')}_{_file_name(line.partition(':')[0])[:40]}"
    told: list[tuple[bool, str]] = []
    # In a thread, because Ray's head may not answer either.
    work = threading.Thread(target=_look_at, args=(others, folder, line, told), name="stacks", daemon=True)
    work.start()
    work.join(LOOK_TIMEOUT_S)
    # A process that can't run explains why the others wait.
    lines = [text for stuck, text in told if stuck] or [text for _, text in told]
    if others and not lines:
        lines = [f"nothing was seen of them in {LOOK_TIMEOUT_S:.0f} s"]
    room = MAX_CHARACTERS - len(line) - len(str(folder)) - 40
    chosen = [text for end, text in enumerate(lines[:MAX_NAMED]) if not end or len("; ".join(lines[: end + 1])) < room]
    more = [f"{len(told) - len(chosen)} more in the files"] if len(told) > len(chosen) else []
    return "".join(f"; {text}" for text in [*chosen, *more, f"stacks: {folder}"])


class _Address(NamedTuple):
    pid: int
    node: str  # Ray's id
    address: str


def _look_at(others: Mapping[str, Any], folder: Path, line: str, told: list[tuple[bool, str]]) -> None:
    """Write the stacks of processes into files and append to `told` whether each can't run, and what it does."""
    import ray

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOLD_FILE).write_text(f"{line}\n")
        (folder / "driver.txt").write_text(own_stacks())
        places = {name: _place(actor) for name, actor in list(others.items())[:MAX_LOOKED_AT]}
        seen = _seen({place for place in places.values() if place is not None})
        waiting = _tasks([others[name] for name, place in places.items() if place and seen[place].idle])
        for name, place in places.items():
            if place is None:
                told.append((True, f"{name} has no process"))
                continue
            found, of_loop = seen[place], waiting.get(others[name], "")
            (folder / f"{_file_name(name)}.txt").write_text("\n\n".join(filter(None, (of_loop, found.text))))
            first = of_loop.partition("\n")[0]
            does = f"has {first}" if first else found.where or "gives no stacks"
            told.append((found.stuck, f"{name} (pid {place.pid} on {place.address}) {does}"))
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:  # also a full disk: the wait must be told
        told.append((True, f"their stacks could not be read or written: {_short(error)}"))


def _place(actor: Any) -> _Address | None:
    """Return where an actor's process runs; None if it has none, or is no actor."""
    import ray
    from ray._private import state  # no public call answers without Ray's dashboard

    if not ray.is_initialized() or not hasattr(actor, "_actor_id"):
        return None
    found = state.state.actor_table(actor._actor_id.hex())
    if not found or not found.get("Pid"):
        return None
    return _Address(found["Pid"], found["Address"]["NodeID"], found["Address"]["IPAddress"])


def _seen(places: set[_Address]) -> dict[_Address, Seen]:
    """Return the states of processes on any node; nodes work in parallel."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not places:
        return {}
    here, by_node = ray.get_runtime_context().get_node_id(), dict[str, list[_Address]]()
    for place in sorted(places):
        by_node.setdefault(place.node, []).append(place)
    task = ray.remote(_look_here)
    asked = {
        node: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote([place.pid for place in on_node])
        for node, on_node in by_node.items()
        if node != here
    }
    found: dict[_Address, Seen] = {}
    for node, on_node in by_node.items():
        try:
            pids = [place.pid for place in on_node]
            seen = ray.get(asked[node], timeout=NODE_TIMEOUT_S) if node in asked else _look_here(pids)
        except (ray.exceptions.RayError, TimeoutError) as error:
            why = f"can't be looked at: node {on_node[0].address} {_short(error)}"
            seen = [Seen(place.pid, "unknown", why) for place in on_node]
        found.update(zip(on_node, seen, strict=True))
    return found


def _look_here(pids: Sequence[int]) -> list[Seen]:
    return [look(pid) for pid in pids]


def _tasks(actors: Sequence[Any]) -> dict[Any, str]:
    """Return where the tasks of asynchronous actors wait; one whose event loop is stuck is omitted."""
    import ray

    asked = {actor.__ray_call__.remote(_own_tasks): actor for actor in actors}
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=TASKS_TIMEOUT_S) if asked else ((), ())
    found = {}
    for ref in done:
        with contextlib.suppress(ray.exceptions.RayError):  # it has died
            found[asked[ref]] = str(ray.get(ref, timeout=TASKS_TIMEOUT_S))
    return found


def _own_tasks(actor: Any) -> str:
    return tasks()


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines else type(error).__name__


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)[:80]
