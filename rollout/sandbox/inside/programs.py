"""Execution of one program within limits. All of its processes are dead afterwards."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import gc
import json
import linecache
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
import types
from typing import Any, NoReturn

from rollout.sandbox.inside.files import BOX, SCRATCH

LOOK_S = 0.05  # interval between two checks of a run's memory and files
_PR_SET_DUMPABLE = 4
_LIBC = ctypes.CDLL(None, use_errno=True)


class Limits:
    """The limits of one run."""

    def __init__(self, text: str) -> None:
        values = json.loads(text)
        self.run_timeout_s: float = values["run_timeout_s"]  # wall-clock
        self.memory_bytes: int = values["memory_bytes"]  # address space of one process; all together have twice this
        self.num_processes: int = values["num_processes"]
        self.num_files: int = values["num_files"]  # in all folders of SCRATCH together
        self.file_bytes: int = values["file_bytes"]  # size of one file
        self.output_bytes: int = values["output_bytes"]  # of stdout and stderr, each
        self.read_bytes: int = values["read_bytes"]  # largest file that the host may read


def kill_others() -> None:
    """Kill every process of the namespace except this one and process 1, in one call that no fork can escape."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def set_dumpable(flag: bool) -> None:
    """Set whether other processes of this uid may trace this one or open its /proc files."""
    if _LIBC.prctl(_PR_SET_DUMPABLE, int(flag), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def run(request: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Run a program until it ends, exceeds a limit or times out. All of its processes are dead afterwards."""
    stdin_read, stdin_write = os.pipe()
    stdout_read, stdout_write = os.pipe()
    stderr_read, stderr_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become_program(request, limits, (stdin_read, stdout_write, stderr_write))
        finally:
            os._exit(1)
    for fd in (stdin_read, stdout_write, stderr_write):
        os.close(fd)
    pipes = Pipes(stdin_write, request["stdin"], {stdout_read: limits.output_bytes, stderr_read: limits.output_bytes})
    cause = watch(pid, pipes, limits)
    kill_others()
    pipes.drain()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    stderr = pipes.text(stderr_read)
    if cause:
        stderr += f"\n[sandbox: killed: {cause}]\n"
    timed_out = cause == "time"
    return {"exit_code": code, "stdout": pipes.text(stdout_read), "stderr": stderr, "timed_out": timed_out}


def watch(pid: int, pipes: Pipes, limits: Limits) -> str:
    """Move data until the program ends, then return ""; if it must be killed, return the cause."""
    ended = os.pidfd_open(pid)
    pipes.poll.register(ended, select.POLLIN)
    now = time.monotonic()
    deadline, next_look = now + limits.run_timeout_s, now + LOOK_S
    while now < deadline:
        for fd, _ in pipes.poll.poll(max(1.0, 1000 * (min(deadline, next_look) - now))):
            if fd == ended:
                return ""
            pipes.move(fd)
        now = time.monotonic()
        if now >= next_look:
            next_look = now + LOOK_S
            if cause := over_limit(limits):
                return cause
    return "time"


class Pipes:
    """stdin, stdout and stderr of a program. Output beyond the limit is read and dropped."""

    def __init__(self, stdin: int, data: str, outputs: dict[int, int]) -> None:
        self.poll = select.poll()
        self._stdin = stdin
        self._unsent = memoryview(data.encode("utf-8", "replace"))
        self._left = dict(outputs)
        self._open = set(outputs)
        self._parts: dict[int, list[bytes]] = {fd: [] for fd in outputs}
        self._truncated: set[int] = set()
        for fd in outputs:
            self.poll.register(fd, select.POLLIN)
        os.set_blocking(stdin, False)
        self.poll.register(stdin, select.POLLOUT)
        if not self._unsent:
            self._close(stdin)

    def move(self, fd: int) -> None:
        """Move the data that is ready on `fd`."""
        if fd == self._stdin:
            try:
                self._unsent = self._unsent[os.write(fd, self._unsent[:65536]) :]
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._unsent = self._unsent[:0]
            if not self._unsent:
                self._close(fd)
            return
        part = os.read(fd, 65536)
        if not part:
            self._open.discard(fd)
            self._close(fd)
        kept = part[: self._left[fd]]
        self._left[fd] -= len(kept)
        if kept:
            self._parts[fd].append(kept)
        if len(kept) < len(part):
            self._truncated.add(fd)

    def drain(self) -> None:
        """Read all remaining output. Call it when all writers have been killed."""
        for fd in list(self._open):
            while fd in self._open:
                self.move(fd)

    def text(self, fd: int) -> str:
        """Return the decoded output, with a note at the end if it was truncated."""
        text = b"".join(self._parts[fd]).decode("utf-8", "replace")
        return text + "\n[sandbox: output truncated]\n" if fd in self._truncated else text

    def _close(self, fd: int) -> None:
        self.poll.unregister(fd)
        os.close(fd)


def over_limit(limits: Limits) -> str:
    """Return the limit that all processes of a run together exceed; "" if none."""
    usage = [os.statvfs(root) for root in SCRATCH]
    if sum(entry.f_files - entry.f_ffree for entry in usage) > limits.num_files:
        return f"more than {limits.num_files} files"
    page = os.sysconf("SC_PAGE_SIZE")
    max_bytes = 2 * limits.memory_bytes
    resident = {pid: _resident_pages(pid) * page for pid in os.listdir("/proc") if pid.isdigit()}
    if sum(resident.values()) <= max_bytes:
        return ""
    if sum(_own_bytes(pid, number) for pid, number in resident.items()) <= max_bytes:
        return ""
    return f"more than {max_bytes >> 20} MiB of memory"


def _resident_pages(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1])
    except OSError:  # it has just ended
        return 0


def _own_bytes(pid: str, resident_bytes: int) -> int:
    """Return resident memory, with shared pages divided among their users; all of it if the process hides its maps."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except PermissionError:
        return resident_bytes
    except OSError:
        return 0
    return 0


def become_program(request: dict[str, Any], limits: Limits, pipes: tuple[int, int, int]) -> NoReturn:
    """Turn this fork into the requested program."""
    os.setsid()
    for target, fd in enumerate(pipes):
        os.dup2(fd, target)
    os.closerange(3, 1024)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    os.chdir(BOX)
    cpu_s = int(limits.run_timeout_s) + 2
    for kind, number in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_NPROC, limits.num_processes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, 128),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        number = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(kind, (number, number))
    set_dumpable(True)
    if "source" in request:
        os._exit(run_source(request["source"]))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    argv = request["argv"]
    try:
        os.execvp(argv[0], argv)
    except (OSError, ValueError) as error:
        os.write(2, f"{argv[0]}: {error}\n".encode("utf-8", "replace"))
    os._exit(127)


def run_source(source: str) -> int:
    """Run a program as `__main__`, like the interpreter does; return its exit code."""
    main_module = types.ModuleType("__main__")
    main_module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main_module
    sys.argv[:] = ["main.py"]
    sys.path.insert(0, BOX)
    builtins.__dict__.update(exit=sys.exit, quit=sys.exit)  # normally set by the `site` module, which is skipped
    linecache.cache["<program>"] = (len(source), None, source.splitlines(True), "<program>")
    gc.enable()
    outcome = Outcome()
    with outcome:
        exec(compile(source, "<program>", "exec", dont_inherit=True), main_module.__dict__)
    with outcome:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for the program's threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    return outcome.exit_code


class Outcome:
    """A context manager that turns an exception into a message and an exit code."""

    exit_code = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            return True
        code = error.code if isinstance(error, SystemExit) else 1
        if isinstance(error, SystemExit) and (code is None or isinstance(code, int)):
            self.exit_code = (code or 0) & 0xFF
            return True
        self.exit_code = 1
        with contextlib.suppress(OSError, ValueError, AttributeError, MemoryError):
            if isinstance(error, SystemExit):
                print(code, file=sys.stderr)
            else:
                traceback.print_exception(kind, error, trace.tb_next)
        return True
