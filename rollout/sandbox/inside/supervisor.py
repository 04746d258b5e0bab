"""Process 1 of a sandbox: it serves requests from the host, one at a time, and outlives the programs that they run.

The host passes the text of these files to `python3 -c`. They need the standard library of Python 3.9, and Linux 5.3.

There are three kinds of processes, each forked from the previous one:

    supervisor (pid 1)  waits for a request, forks a handler, and reaps processes. It does not read the request, so
                        its memory contains no data of an episode, and every handler starts from the same state.
    handler             reads one request, serves it, kills all other processes, answers, and ends.
    program             the requested program, with limits, without the request pipe, and in a new session.

Programs have the handler's uid and can send it signals. The supervisor, which the kernel protects from signals of its
own namespace, reports a handler that was killed or stopped. Programs can't trace the supervisor or a handler or open
their files, because both are not dumpable. Every process that a run leaves behind is killed before the answer is sent.

Frames in both directions: 4 bytes of length (big endian), then a JSON object. Every answer has the `number` of its
request, from 0. The host needs it for a handler that has answered but does not end in time: the supervisor's report on
that handler follows the answer, and must not be taken for the answer to the next request.
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
GRACE_S = 2.0  # added to the limit of a run; the sum is the limit of its handler


# Supervisor -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Serve until the host closes the request pipe."""
    if os.getpid() != 1:
        raise SystemExit("sandbox supervisor: must be process 1 of its own pid namespace, or it would kill its host")
    limits = Limits(sys.argv[1])
    sys.path[:] = [entry for entry in sys.path if entry]  # the supervisor must not import from the workspace
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    os.closerange(3, 1024)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # if the machine runs out of memory, the kernel kills sandboxes before the training
    set_dumpable(False)
    wipe()
    gc.disable()
    gc.freeze()
    number = 0
    while serve_one(limits, number):
        number += 1


def serve_one(limits: Limits, number: int) -> bool:
    """Wait for a request and fork a handler for it. False: the host has closed the pipe."""
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    waiting.poll()  # returns when a request arrives or the host closes the pipe
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
    """Return the exit code of a handler, or minus the signal that ended or stopped it; None after `timeout_s`."""
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
    """Reap a child and return its pid and status; None if there are no children."""
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
    """Serve one request according to its `op`, and return the answer."""
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
    """Return the next `num_bytes` bytes from the host; None at the end of the stream."""
    parts = []
    while num_bytes:
        part = os.read(0, min(num_bytes, 1 << 20))
        if not part:
            return None
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def read_frame() -> dict[str, Any] | None:
    """Return the next request; None: the host has closed the pipe."""
    header = read_exactly(4)
    body = None if header is None else read_exactly(struct.unpack(">I", header)[0])
    return None if body is None else json.loads(body)


def write_frame(message: dict[str, Any]) -> None:
    """Write a frame to the host."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")
    data = memoryview(struct.pack(">I", len(body)) + body)
    while data:
        data = data[os.write(1, data) :]
