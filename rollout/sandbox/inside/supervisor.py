"""Process 1 of a sandbox: serves requests from the host, one at a time, and outlives whatever they run.

The host passes the text of these files to `python3 -c`; they need the standard library of Python 3.9 and Linux 5.3.

Three kinds of process, each forked from the one before:

    supervisor (pid 1)  waits for a request, forks a handler, reaps. It reads no byte of a request, so its memory
                        holds nothing of an episode, and every handler starts from the same state.
    handler             reads one request, serves it, kills everything else, answers, ends.
    program             what the request wants run: limited, without the request pipe, in a session of its own.

Programs have the handler's uid and may signal it: a handler that is killed or stopped is reported as such by the
supervisor, which the kernel shields from signals of its own namespace. They can't trace it or open its files:
supervisor and handler are not dumpable. Every process that a run leaves behind is killed before its answer is sent.

Frames in both directions: 4 bytes length (big endian), then a JSON object. Every answer carries the `number` of its
request, from 0: where a handler has answered but does not end in time, the supervisor's report of that follows, and the
host must know that it is no answer to the next request.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import struct
import sys
import time
from typing import Any

from rollout.sandbox.inside.files import BOX, SCRATCH, RequestError, read_file, wipe, write_file
from rollout.sandbox.inside.programs import Limits, kill_others, run, set_dumpable

ANSWERED, HOST_IS_GONE = 0, 3  # exit codes of a handler
GRACE_S = 2.0  # what a handler gets beyond the limit of a run


# Supervisor -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Serve until the host closes the request pipe."""
    if os.getpid() != 1:
        raise SystemExit("sandbox supervisor: not process 1 of a pid namespace of its own; it would kill its host")
    limits = Limits(sys.argv[1])
    sys.path[:] = [entry for entry in sys.path if entry]  # nothing of ours is ever imported from the workspace
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    os.closerange(3, 1024)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # the machine's memory runs out: kill sandboxes before the training
    set_dumpable(False)
    wipe()
    gc.disable()
    gc.freeze()
    number = 0
    while serve_one(limits, number):
        number += 1


def serve_one(limits: Limits, number: int) -> bool:
    """Wait for a request and have it handled. False: the host is gone."""
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    waiting.poll()  # ends with a request or with the host's end of the pipe
    handler = os.fork()
    if handler == 0:
        code = 1
        try:
            code = handle(limits, number)
        finally:
            os._exit(code)
    ended = wait_for(handler, limits.run_timeout_s + GRACE_S)
    kill_others()
    while reap(os.WUNTRACED) is not None:
        pass
    if ended == HOST_IS_GONE:
        return False
    if ended != ANSWERED:
        write_frame({"number": number, "handler_ended": ended})
    return True


def wait_for(handler: int, timeout_s: float) -> int | None:
    """Return the exit code of a handler (negative: a signal, a stop included); None when it has not ended in time."""
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        signal.sigtimedwait({signal.SIGCHLD}, left_s)
        while (ended := reap(os.WNOHANG | os.WUNTRACED)) is not None:
            pid, status = ended
            if pid == handler:
                return -os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
            if pid == 0:
                break
    return None


def reap(options: int) -> tuple[int, int] | None:
    """Wait for any child that has ended and return its status; None when there is none."""
    try:
        return os.waitpid(-1, options)
    except ChildProcessError:
        return None


# Handler --------------------------------------------------------------------------------------------------------


def handle(limits: Limits, number: int) -> int:
    """Read one request and answer it; return the handler's exit code."""
    request = read_frame()
    if request is None:
        return HOST_IS_GONE
    try:
        os.chmod(BOX, SCRATCH[BOX])
        reply = serve(request, limits)
    except RequestError as error:
        reply = {"error": error.kind, "message": str(error)}
    except OSError as error:
        name = "" if error.filename is None else f": {error.filename!r}"
        reply = {"error": "os", "errno": error.errno, "message": f"{error.strerror}{name}"}
    write_frame({"number": number, **reply})
    return ANSWERED


def serve(request: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Handle one request, by its `op`."""
    op = request["op"]
    if op == "write":
        for path, text in request["files"].items():
            write_file(BOX, path, text)
        return {}
    if op == "read":
        return {"text": read_file(BOX, request["path"], limits.read_bytes)}
    if op == "run":
        return run(request, limits)
    if op == "reset":
        wipe()
        return {}
    raise RequestError("value", f"unknown operation {op!r}")


def read_exactly(num_bytes: int) -> bytes | None:
    """Return what came from the host; None at the end of its stream."""
    parts = []
    while num_bytes:
        part = os.read(0, min(num_bytes, 1 << 20))
        if not part:
            return None
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def read_frame() -> dict[str, Any] | None:
    """Return the next request; None: the host is gone."""
    header = read_exactly(4)
    body = None if header is None else read_exactly(struct.unpack(">I", header)[0])
    return None if body is None else json.loads(body)


def write_frame(message: dict[str, Any]) -> None:
    """Write a frame to the host."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")
    data = memoryview(struct.pack(">I", len(body)) + body)
    while data:
        data = data[os.write(1, data) :]
