"""Stack dumps of running processes, also of one that is stuck.

    listen()      in a process, when it starts: from now on SIGUSR2 makes it write the stacks of all its threads
    look(pid)     in another process of the same user and machine: the stacks and states of a process and its children

The stacks are written by `faulthandler` in the signal's handler, so an endless loop, a deadlock or C code that holds
the interpreter's lock does not prevent them, and no privilege is needed. They go into an anonymous file in memory that
the reader finds through /proc, so nothing has to be agreed on and nothing is left behind. A stopped process writes
none: its state is reported instead. For processes that do not listen, py-spy is used if it is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import psutil

from machine.failures import Frame, frames_in

SIGNAL = signal.SIGUSR2
FILE_NAME = "slime-stacks"  # of the file in memory, as /proc shows it
WRITE_TIMEOUT_S = 5.0  # for a process to write its stacks
QUIET_S = 0.2  # without a new byte, the stacks are complete
SPY_TIMEOUT_S = 20.0
RAY_LOOP = "ray/_private/worker.py:"  # where an actor without a call waits
CHILDREN_NAMED = 2
MAX_CHILDREN = 32  # a rollout worker has hundreds of sandbox processes
STUCK = {psutil.STATUS_STOPPED: "is stopped (state T)", psutil.STATUS_DISK_SLEEP: "waits for a disk (state D)"}
_listening: list[Any] = []  # the open file of this process


def listen() -> None:
    """Let SIGUSR2 write the stacks of this process's threads from now on."""
    if not _listening:
        file = os.fdopen(os.memfd_create(FILE_NAME), "w")
        faulthandler.register(SIGNAL, file, all_threads=True, chain=False)
        _listening.append(file)


@dataclass(frozen=True)
class Seen:
    """The state of one process and of its interesting descendants at one moment."""

    pid: int
    name: str
    trouble: str = ""  # why it can't run, e.g. "is stopped (state T)"
    stacks: str = ""  # of its threads, or why there are none
    children: tuple[Seen, ...] = ()

    @property
    def text(self) -> str:
        """Return everything for a file."""
        head = f"process {self.pid} ({self.name}) {self.trouble or 'is alive'}"
        return "\n\n".join([f"{head}\n{self.stacks}", *(child.text for child in self.children)])

    @property
    def idle(self) -> bool:
        """Return whether the process runs, and nothing but libraries in it: its event loop may tell more (`tasks`)."""
        return not self.trouble and not any(frame.outside_libraries() for frame in frames_in(self.stacks))

    @property
    def stuck(self) -> bool:
        """Return whether the process or one of its children can't run."""
        return bool(self.trouble) or any(child.trouble for child in self.children)

    @property
    def where(self) -> str:
        """Return in a few words what the process does: why it can't run, or its innermost frame and its children's.

        "" if nothing is known.
        """
        if self.trouble:
            return self.trouble
        stuck = next((child for child in self.children if child.trouble), None)
        if stuck is not None:
            return f"has a process that {stuck.trouble}: {stuck.name} (pid {stuck.pid})"
        named = [(f"{child.name} ", child) for child in self.children[:CHILDREN_NAMED]]
        frames = [(name, innermost(seen.stacks)) for name, seen in [("", self), *named]]
        found = [f"{name}{_does(frame)}" for name, frame in frames if frame is not None]
        return ", its ".join(found)


def _does(frame: Frame) -> str:
    return "waits for a call" if str(frame).startswith(RAY_LOOP) and frame.function == "main_loop" else f"is in {frame}"


def look(pid: int, wait_s: float = WRITE_TIMEOUT_S) -> Seen:
    """Return the state of a process and of its descendants that listen or can't run."""
    try:
        process = psutil.Process(pid)
        children = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return Seen(pid, "unknown", "has ended")
    found = [_look(child, wait_s) for child in children if _file_of(child.pid) is not None or _trouble(child)]
    return _with_children(_look(process, wait_s), found[:MAX_CHILDREN])


def own_stacks() -> str:
    """Return the stacks of this process's threads."""
    with os.fdopen(os.memfd_create("own-stacks"), "w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def tasks() -> str:
    """Return where this process's asyncio tasks wait, one line for each place: "3 tasks in FRAME"."""
    # A method that is not asynchronous runs outside of the actor's event loop, whose tasks asyncio then does not list.
    found = [one for one in gc.get_objects() if issubclass(type(one), asyncio.Task) and not one.done()]
    places = Counter(str(frame) for frame in map(_task_frame, found) if frame is not None)
    return "\n".join(f"{count} task{'s' * (count > 1)} in {place}" for place, count in places.most_common())


def innermost(stacks: str) -> Frame | None:
    """Return the frame that describes best what a process does, from its stacks; None if they have no frame.

    Threads are compared in the order of age, since the main thread is the oldest and a library's helper threads are
    young: the first with a frame outside of libraries gives its innermost such frame. Without one, it is the innermost
    frame of an installed package.
    """
    threads = [list(frames_in(thread)) for thread in stacks.split("\n\n") if thread.strip()]
    for wanted in (Frame.outside_libraries, Frame.in_package):
        for frames in reversed(threads):
            if found := next((frame for frame in frames if wanted(frame)), None):
                return found
    return next((frames[0] for frames in reversed(threads) if frames), None)


def _with_children(seen: Seen, children: Sequence[Seen]) -> Seen:
    return Seen(seen.pid, seen.name, seen.trouble, seen.stacks, tuple(children))


def _look(process: psutil.Process, wait_s: float) -> Seen:
    try:
        name, trouble = process.name(), _trouble(process)
        return Seen(process.pid, name, trouble, _stacks(process, wait_s))
    except psutil.NoSuchProcess:
        return Seen(process.pid, "unknown", "has ended")


def _trouble(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return STUCK.get(process.status(), "")
    return ""


def _stacks(process: psutil.Process, wait_s: float) -> str:
    file = _file_of(process.pid)
    if file is None or process.status() == psutil.STATUS_STOPPED:
        return _spied(process.pid) or f"no stacks: it {'does not listen for SIGUSR2' if file is None else 'is stopped'}"
    try:
        before = now = file.stat().st_size
        os.kill(process.pid, SIGNAL)
        began = changed = time.monotonic()
        while time.monotonic() < began + wait_s and (now == before or time.monotonic() < changed + QUIET_S):
            time.sleep(0.02)
            if (size := file.stat().st_size) != now:
                now, changed = size, time.monotonic()
        with file.open(errors="replace") as stacks:
            stacks.seek(before)
            return stacks.read() or _spied(process.pid) or f"no stacks: it has not written them in {wait_s:g} s"
    except (OSError, ProcessLookupError) as error:
        return f"no stacks: {error}"


def _file_of(pid: int) -> Path | None:
    """Return the path of a listening process's file; None if it does not listen.

    A process that does not listen must not be sent the signal, since it would die of it.
    """
    with contextlib.suppress(OSError):  # the process has ended, or is another user's
        for path in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(path).startswith(f"/memfd:{FILE_NAME}"):
                return path
    return None


def _spied(pid: int) -> str:
    """Return what py-spy shows of a process; "" if it is not installed or not allowed to."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return ""
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=SPY_TIMEOUT_S, check=False)
        return done.stdout if done.returncode == 0 else ""
    return ""


def _task_frame(task: asyncio.Task[Any]) -> Frame | None:
    """Return the innermost frame outside of libraries in which a task waits; None for a library's own task."""
    own = [frame for frame in _awaited(task.get_coro()) if frame.outside_libraries()]
    return own[-1] if own else None


def _awaited(coroutine: Any) -> Iterator[Frame]:
    """Yield the frames of a chain of coroutines, outermost first."""
    while coroutine is not None:
        code: CodeType | None = getattr(coroutine, "cr_code", None)
        frame = getattr(coroutine, "cr_frame", None)
        if code is not None and frame is not None:
            yield Frame(code.co_filename, frame.f_lineno or 0, code.co_name)
        awaited = getattr(coroutine, "cr_await", None)
        if type(awaited).__name__ == "coroutine_wrapper":  # between compiled code, as of Ray, and a coroutine
            awaited = next((one for one in gc.get_referents(awaited) if inspect.iscoroutine(one)), None)
        coroutine = awaited
