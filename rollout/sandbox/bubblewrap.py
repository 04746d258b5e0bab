"""Bubblewrap sandboxes, kept alive between episodes.

Life cycle: started (about 50 ms) -> idle -> lent to an episode -> reset (every process dead, every writable folder
empty) -> idle. After an error a sandbox is ended and never lent again.

Each run is one request to the supervisor inside the sandbox, which forks (a few ms) instead of starting an interpreter.
Every process that a run has started is dead when the run returns; files stay until the episode ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import struct
import subprocess
from typing import Any

from rollout.config import SandboxConfig
from rollout.sandbox.interface import RunResult, Sandbox, require_argv, require_files, require_text
from rollout.sandbox.jail import Jail, build_jail, last_message, start

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 30.0  # for a request that runs no program
HOST_GRACE_S = 5.0  # added to the supervisor's limit for a run; the sum is the host's limit
END_TIMEOUT_S = 10.0  # for a killed process to end
MAX_STARTING = 4  # number of sandboxes that start concurrently
MAX_ANSWER_BYTES = 64 * 1024 * 1024

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_log = logging.getLogger(__name__)
_numbers = itertools.count(1)


class BubblewrapSandbox:
    """One sandbox. Any method raises RuntimeError if the sandbox has ended; the message gives its name and the reason.

    `write_files` and `read_file` raise OSError if the workspace refuses, for example because it is full.
    """

    def __init__(self, jail: Jail, config: SandboxConfig) -> None:
        self.name = f"sandbox {next(_numbers)} of process {os.getpid()}"
        self._run_timeout_s = config.run_timeout_s
        self._process, self._socket, self._messages = start(jail)
        self._connection: asyncio.Task[_Streams] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._turn = asyncio.Lock()  # one request at a time
        self._asking = False  # a request is pending; stays True if its caller was cancelled
        self._num_requests = 0
        self._lost = ""  # why it has ended

    async def open(self) -> None:
        """Wait until the sandbox serves requests. RuntimeError: it did not start."""
        if self._lost:
            raise RuntimeError(f"{self.name} is gone: {self._lost}")
        # Opening the connection takes two iterations of the event loop. Meanwhile it must not be cancelled and its
        # socket must stay open: libuv, on which Ray's loops run, aborts the process if a socket that it starts to
        # watch is closed.
        self._connection = asyncio.create_task(asyncio.open_unix_connection(sock=self._socket))
        self._reader, self._writer = await asyncio.shield(self._connection)
        await self._ask({"op": "reset"}, START_TIMEOUT_S)

    async def write_files(self, files: dict[str, str]) -> None:
        """See `Sandbox`."""
        require_files(files)
        await self._ask({"op": "write", "files": files}, ANSWER_TIMEOUT_S)

    async def read_file(self, path: str) -> str:
        """See `Sandbox`."""
        require_text(path=path)
        return str((await self._ask({"op": "read", "path": path}, ANSWER_TIMEOUT_S))["text"])

    async def run_python(self, source: str, stdin: str = "") -> RunResult:
        """See `Sandbox`. The program sees the standard library and the workspace's own modules."""
        require_text(source=source, stdin=stdin)
        return await self._run({"op": "run", "source": source, "stdin": stdin})

    async def run(self, argv: list[str], stdin: str = "") -> RunResult:
        """See `Sandbox`. A command that does not exist ends with exit code 127."""
        require_argv(argv)
        require_text(stdin=stdin)
        return await self._run({"op": "run", "argv": argv, "stdin": stdin})

    async def reset(self) -> bool:
        """Return the sandbox to its initial state. False: it can't be used again."""
        if self._asking or not self.alive:
            return False
        try:
            await self._ask({"op": "reset"}, ANSWER_TIMEOUT_S)
        except (RuntimeError, OSError) as error:
            self.kill(f"reset failed: {error}")
            return False
        return True

    @property
    def alive(self) -> bool:
        """Return whether the sandbox is running."""
        return not self._lost and self._process.poll() is None

    def kill(self, cause: str) -> None:
        """Kill all processes of the sandbox without waiting for their end."""
        self._lost = self._lost or cause
        self._process.kill()  # the other processes die with it (PR_SET_PDEATHSIG)
        if self._connection is None:
            self._socket.close()
        else:
            self._connection.add_done_callback(_hang_up)

    async def gone(self) -> None:
        """Wait until a killed sandbox has ended. TimeoutError: it has not; the message names it."""
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                while self._process.poll() is None:
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise TimeoutError(f"{self.name} (pid {self._process.pid}) is not dead after {END_TIMEOUT_S} s") from None
        if self._messages >= 0:
            os.close(self._messages)
            self._messages = -1

    def _last_words(self) -> str:
        return last_message(self._messages) if self._messages >= 0 else "no message"

    async def _run(self, request: dict[str, Any]) -> RunResult:
        try:
            answer = await self._ask(request, self._run_timeout_s + HOST_GRACE_S)
        except TimeoutError:
            return RunResult(exit_code=-9, stdout="", stderr="", timed_out=True)
        if "handler_ended" in answer:  # the program has killed or stopped its handler
            note = "\n[sandbox: killed: the program attacked its supervisor]\n"
            return RunResult(exit_code=-9, stdout="", stderr=note, timed_out=answer["handler_ended"] is None)
        return RunResult(**answer)

    async def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and return its answer. TimeoutError: the sandbox did not answer and was ended."""
        async with self._turn:
            if not self.alive:
                self.kill(f"it ended: {self._last_words()}")
                raise RuntimeError(f"{self.name} is gone: {self._lost}")
            self._asking = True
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await self._exchange(request)
            except TimeoutError:
                self.kill(f"no answer to {request['op']!r} within {timeout_s} s")
                raise TimeoutError(f"{self.name} was ended: {self._lost}") from None
            except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
                await asyncio.sleep(0.01)  # let the sandbox write its last error message
                self.kill(f"{error} during {request['op']!r}; {self._last_words()}")
                raise RuntimeError(f"{self.name} is gone: {self._lost}") from error
            self._asking = False
        if "error" in answer:
            raise self._refusal(answer)
        if "handler_ended" in answer and request["op"] != "run":
            self.kill(f"{request['op']!r} failed: {self._last_words()}")
            raise RuntimeError(f"{self.name} is gone: {self._lost}")
        return answer

    async def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._reader is not None, "open() comes first"
        assert self._writer is not None, "open() comes first"
        number, self._num_requests = self._num_requests, self._num_requests + 1
        self._writer.write(encode(request))
        await self._writer.drain()
        while True:
            num_bytes = answer_bytes(await self._reader.readexactly(4))
            answer = decode(await self._reader.readexactly(num_bytes))
            answered = answer.pop("number", -1)
            if answered == number:
                return answer
            if not 0 <= answered < number:
                raise ValueError(f"an answer to request {answered} came for request {number}")
            # Skip it: the supervisor reports the end of a handler whose answer has already arrived.

    def _refusal(self, answer: dict[str, Any]) -> Exception:
        message = str(answer.get("message"))
        if answer["error"] == "missing":
            return FileNotFoundError(message)
        if answer["error"] == "os":
            return OSError(answer.get("errno"), f"{self.name}: {message}")
        return ValueError(message)


class BubblewrapPool:
    """Lends bubblewrap sandboxes. Make and use it in one event loop, whose thread must live as long as the pool."""

    def __init__(self, config: SandboxConfig) -> None:
        """RuntimeError: a required program or library is missing; the message names it."""
        self._config = config
        self._jail = build_jail(config)
        self._all: set[BubblewrapSandbox] = set()
        self._idle: list[BubblewrapSandbox] = []
        self._refills: set[asyncio.Task[None]] = set()
        self._starting = asyncio.Semaphore(MAX_STARTING)
        self._closed = False

    async def acquire(self) -> BubblewrapSandbox:
        """See `SandboxPool`."""
        if self._closed:
            raise RuntimeError("the sandbox pool is closed")
        sandbox = None
        while self._idle and sandbox is None:
            candidate = self._idle.pop()
            if candidate.alive:
                sandbox = candidate
            else:
                await self._end(candidate, "it ended while idle")
        self._refill()
        return sandbox or await self._start()

    async def release(self, sandbox: Sandbox) -> None:
        """See `SandboxPool`. A sandbox that can't be reset is ended and replaced by a new one."""
        if self._closed:
            return  # `close` ends it
        if not isinstance(sandbox, BubblewrapSandbox) or sandbox not in self._all or sandbox in self._idle:
            raise ValueError(f"{getattr(sandbox, 'name', sandbox)!r} was not lent by this pool")
        clean = False
        try:
            clean = await sandbox.reset()
        finally:
            if clean and not self._closed:
                self._idle.append(sandbox)
            else:
                sandbox.kill("released")
        if not clean:
            await self._end(sandbox, "released")
            if not self._closed:
                self._refill()

    async def close(self) -> None:
        """See `SandboxPool`. TimeoutError: a sandbox does not end; the message names it."""
        self._closed = True
        self._idle.clear()
        refills = list(self._refills)
        for task in refills:
            task.cancel()
        await asyncio.gather(*refills, return_exceptions=True)
        for sandbox in list(self._all):
            sandbox.kill("the pool was closed")
        for sandbox in list(self._all):
            await self._end(sandbox, "the pool was closed")

    async def _start(self) -> BubblewrapSandbox:
        async with self._starting:
            if self._closed:
                raise RuntimeError("the sandbox pool is closed")
            sandbox = BubblewrapSandbox(self._jail, self._config)
            self._all.add(sandbox)
            ready = False
            try:
                await sandbox.open()
                ready = True
            except (RuntimeError, TimeoutError) as error:
                await self._end(sandbox, "it did not start")
                raise RuntimeError(f"no sandbox can be started: {error}") from error
            finally:
                if not ready:
                    sandbox.kill("it did not start")
        return sandbox

    async def _end(self, sandbox: BubblewrapSandbox, cause: str) -> None:
        sandbox.kill(cause)
        await sandbox.gone()
        self._all.discard(sandbox)

    def _refill(self) -> None:
        """Start sandboxes until the configured number is idle."""
        for _ in range(self._config.num_prestarted - len(self._idle) - len(self._refills)):
            task = asyncio.create_task(self._start_idle())
            self._refills.add(task)
            task.add_done_callback(self._refills.discard)

    async def _start_idle(self) -> None:
        try:
            sandbox = await self._start()
        except (RuntimeError, OSError) as error:
            _log.warning("an idle sandbox could not be started: %s", error)
            return
        self._idle.append(sandbox)


def _hang_up(connection: asyncio.Task[_Streams]) -> None:
    if not connection.cancelled() and connection.exception() is None:
        connection.result()[1].transport.abort()


def run_once(jail: Jail, source: str, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
    """Start a sandbox, run one program in it, and end it. Blocks. RuntimeError: the sandbox did not work."""
    process, ours, messages = start(jail)
    try:
        ours.settimeout(timeout_s)
        ours.sendall(encode({"op": "run", "source": source, "stdin": ""}))
        answer = decode(_receive(ours, answer_bytes(_receive(ours, 4))))
        answer.pop("number", None)
        return answer
    except (OSError, ValueError) as error:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        raise RuntimeError(f"a test sandbox did not work: {last_message(messages)} ({error})") from error
    finally:
        process.kill()
        process.wait(END_TIMEOUT_S)
        ours.close()
        os.close(messages)


def encode(message: dict[str, Any]) -> bytes:
    """Return a frame: 4 bytes of length, then JSON."""
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def answer_bytes(header: bytes) -> int:
    """Return the length of an answer in bytes. ValueError: more than MAX_ANSWER_BYTES."""
    num_bytes = int(struct.unpack(">I", header)[0])
    if num_bytes > MAX_ANSWER_BYTES:
        raise ValueError(f"the sandbox announced an answer of {num_bytes} bytes; the limit is {MAX_ANSWER_BYTES}")
    return num_bytes


def decode(body: bytes) -> dict[str, Any]:
    """Return the object in a frame. ValueError: the frame contains no object."""
    answer = json.loads(body)
    if not isinstance(answer, dict):
        raise ValueError(f"an answer is a {type(answer).__name__}, not an object")
    return answer


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise ConnectionError("its request pipe was closed")
        data += part
    return data
