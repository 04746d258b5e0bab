"""Folder locks that prevent two commands from writing to the same folder.

A lock is a file next to or in the folder. Its holder locks it with flock and writes its identity into it. The kernel
releases the lock when the holder dies for any reason, which is sufficient on one machine. On a shared disk flock may
have no effect, so the holder also increments a counter in the file every `BEAT_S` seconds. A lock of another machine
counts as held while its counter changes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

BEAT_S = 5.0
SILENT_S = 30.0  # a lock of another machine counts as free if its counter has not changed for this time
POLL_S = 0.5
LOCK_FILE = "run.lock"  # of a run
ATTEMPTS = 10  # to create a folder that other processes create and remove
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class LockError(RuntimeError):
    """The folder is locked by another process or not writable. The message is one line with the cure."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int
    started: str
    kernel: str  # identifies one boot of one machine
    beats: int = 0

    @staticmethod
    def here() -> Holder:
        boot = Path("/proc/sys/kernel/random/boot_id")
        kernel = boot.read_text().strip() if boot.is_file() else socket.gethostname()
        return Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), kernel)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (started {self.started})"


def _holder(path: Path) -> Holder | None:
    """Return the holder that a lock file names, or None."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


class FolderLock:
    """A lock that is held within a `with` block. It creates missing folders and removes them at the end if empty.

    With `wait`, print the holder once and wait until the lock is free. LockError: another process holds the lock and
    `wait` is False, or the folder is not writable.
    """

    def __init__(self, path: Path, cure: str = "", wait: bool = False) -> None:
        """Prepare the lock. `path`: the lock file. `cure`: alternatives to waiting, appended to the error message."""
        self._path = path
        self._cure = cure
        self._wait = wait
        self._made: list[Path] = []
        self._end = threading.Event()

    def __enter__(self) -> FolderLock:
        told, vanished = False, 0
        while True:
            try:
                held_by = self._try()
            except OSError as error:
                vanished += isinstance(error, FileNotFoundError)
                if 0 < vanished < ATTEMPTS:  # another process has just removed the folder
                    continue
                self._remove_folders()
                raise LockError(f"{self._path.parent} can't be written to: {error.strerror or error}") from error
            if held_by is None:
                self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
                self._beating.start()
                return self
            if not self._wait:
                raise LockError(f"{self._path.parent} is in use by {held_by}: wait until it ends{self._cure}")
            if not told:
                print(f"waiting for {held_by}, which holds {self._path}", file=sys.stderr, flush=True)
                told = True
            time.sleep(POLL_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._beating.join()
        if self._is_mine():
            self._path.unlink(
                missing_ok=True
            )  # before the release: no process may lock a file that is about to be deleted
        os.close(self._file)
        self._remove_folders()

    def _try(self) -> Holder | str | None:
        """Acquire the lock and return None, or return its holder."""
        self._make_folders()
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(file)
                if isinstance(error, BlockingIOError):
                    return _holder(self._path) or "another process"
                raise
        if not self._is_at_path(file):  # its holder has just removed it
            os.close(file)
            return self._try()
        alive = self._alive_elsewhere()
        if alive is not None:
            os.close(file)
            return alive
        self._file, self._me = file, Holder.here()
        self._write()
        return None

    def _is_at_path(self, file: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        return False

    def _alive_elsewhere(self) -> Holder | None:
        """Return the holder on another machine if its counter still changes, else None."""
        first = _holder(self._path)
        if first is None or first.kernel == Holder.here().kernel:
            return None
        deadline = time.monotonic() + SILENT_S
        while time.monotonic() < deadline:
            time.sleep(POLL_S)
            if (now := _holder(self._path)) != first:
                return now or first
        return None

    def _is_mine(self) -> bool:
        """Return whether this process still holds the lock: another machine may take it over if this one stalls."""
        found = _holder(self._path)
        return found is not None and replace(found, beats=0) == replace(self._me, beats=0)

    def _write(self) -> None:
        text = json.dumps(asdict(self._me)).encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        os.fsync(self._file)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S) and self._is_mine():
            self._me = replace(self._me, beats=self._me.beats + 1)
            with suppress(OSError):  # a full disk is reported by the code that writes the run's data
                self._write()

    def _make_folders(self) -> None:
        missing = [folder for folder in (self._path.parent, *self._path.parent.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # it is no longer empty
                folder.rmdir()


def holder_of(run_dir: Path) -> Holder | None:
    """Return the process that has a run's folder, as far as can be seen from this machine without taking the lock; None
    when nobody has.
    """
    path = run_dir / LOCK_FILE
    found = _holder(path)
    if found is None:
        return None
    if found.kernel == Holder.here().kernel:
        return found if Path(f"/proc/{found.pid}").exists() else None
    with suppress(OSError):
        return found if time.time() - path.stat().st_mtime < SILENT_S else None
    return None


def run_lock(run_dir: Path, wait: bool = False) -> FolderLock:
    """Return the lock of a run's folder."""
    return FolderLock(run_dir / LOCK_FILE, ", stop it, or choose another run= name", wait)


def run_holder(run_dir: Path) -> Holder | None:
    """Return the process that has a run's folder, or had it when it was killed; None: no one."""
    return _holder(run_dir / "run.lock")


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Create a cached folder atomically unless it exists. `make` fills the folder that it receives.

    Other processes that need the same folder wait. LockError: the folder is not writable.
    """
    if folder.exists():
        return
    with FolderLock(folder.with_name(f"{folder.name}.lock"), wait=True):
        if folder.exists():
            return
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
        make(part)
        part.rename(folder)
