"""One-line descriptions of errors and exit codes, and cleanup of descendant processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

END_TIMEOUT_S = 10.0  # deadline for killed processes to disappear
MAX_CHARACTERS = 600  # length of a reason; the traceback has the full text
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_ROOT = Path(__file__).parent.parent
_OURS = ("buffer", "critic", "launch", "machine", "rollout", "slime", "trainer")
_SENTENCES = (RuntimeError, ValueError, TimeoutError)  # raised by this project with a complete message
# As in tracebacks ("line 7, in f") and in the stacks that faulthandler writes ("line 7 in f").
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<function>\S+)')
_PACKAGES = ("site-packages", "dist-packages")


class Frame(NamedTuple):
    """A stack frame."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """Return "trainer/worker.py:7 f": the path within this project or a package, else the file's name."""
        path = Path(self.file)
        start = next((i + 1 for i, part in enumerate(path.parts) if part in _PACKAGES), len(path.parts) - 1)
        short = path.relative_to(_ROOT) if self.ours else Path(*path.parts[start:])
        return f"{short}:{self.line} {self.function}"

    @property
    def ours(self) -> bool:
        """Return whether it is of this project."""
        path = Path(self.file)
        return path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _OURS

    def in_package(self) -> bool:
        """Return whether it is of an installed package."""
        return not set(Path(self.file).parts).isdisjoint(_PACKAGES)

    def outside_libraries(self) -> bool:
        """Return whether it is neither of an installed package nor of Python itself."""
        return {*_PACKAGES, "lib", "lib64"}.isdisjoint(Path(self.file).parts) and "<" not in self.file


def frames_in(text: str) -> Iterator[Frame]:
    """Yield the frames of a traceback or of a stack dump, in the order of the text."""
    for found in _FRAME.finditer(text):
        yield Frame(found["file"], int(found["line"]), found["function"])


def reason(error: BaseException) -> str:
    """Return an error's message as one line. Add its type and source location if the message alone is not enough.

    For example, the message of KeyError("a") is only 'a'. The source location is the innermost frame of the user's
    own code, or the innermost frame of all if no user code was running. An error from another Ray process is described
    as it was raised there.
    """
    cause = getattr(error, "cause", None)
    origin = cause if isinstance(cause, BaseException) else error
    text = str(origin)
    if getattr(
        error, "actor_init_failed", False
    ):  # Ray includes the constructor's traceback; its last line is the error
        text = text.strip().rsplit("\n", 1)[-1]
    text = " ".join(text.split())
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]} ..."
    frames = list(_frames(error, origin))
    if text and isinstance(origin, _SENTENCES) and (not frames or frames[-1].ours):
        return text
    said = f"{type(origin).__name__}: {text}" if text else type(origin).__name__
    users = [frame for frame in frames if not frame.ours and frame.outside_libraries()]
    if not frames:
        return said
    place = (users or frames)[-1]
    return f"{said} ({Path(place.file).name}:{place.line} in {place.function})"


def _frames(error: BaseException, origin: BaseException) -> Iterator[Frame]:
    """Yield the stack frames of the process that raised the error, outermost first."""
    elsewhere = getattr(error, "traceback_str", None)
    if origin is not error and isinstance(elsewhere, str):
        yield from frames_in(elsewhere)
        return
    for frame in traceback.extract_tb(origin.__traceback__):
        yield Frame(frame.filename, frame.lineno or 0, frame.name)


def ending(code: int) -> str:
    """Describe how a process ended. A negative exit code, or one above 128 as in a shell, stands for a signal."""
    try:
        name = signal.Signals(-code if code < 0 else code - 128).name
    except ValueError:
        return f"ended with exit code {code}"
    return f"was killed by {name}{', e.g. by the out-of-memory killer' if name == 'SIGKILL' else ''}"


def adopt_orphans() -> None:
    """Make this process a subreaper: it adopts orphaned descendants, so that `end_descendants` finds them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_descendants() -> None:
    """Kill every descendant of this process and wait up to `END_TIMEOUT_S` until all are gone."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while (found := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in found:  # adopted orphans are children of this process, too
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
        time.sleep(0.01)
