"""Plain subprocesses in a temporary folder, without isolation.

A program can use the network, can read and write all of the user's files, and can leave processes behind by starting a
new session. For `allow_unsafe=true` and trusted programs only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from rollout.config import SandboxConfig
from rollout.sandbox.inside.files import RequestError, read_file, write_file
from rollout.sandbox.interface import RunResult, Sandbox, require_argv, require_files, require_text
from rollout.sandbox.jail import OUTPUT_BYTES, READ_BYTES, WORKSPACE_BYTES

_CUT = "\n[sandbox: output truncated]\n"
_LIMIT_AND_EXEC = """
import json, os, resource, sys
for name, number in json.loads(sys.argv[1]).items():
    hard = resource.getrlimit(getattr(resource, name))[1]
    number = number if hard == resource.RLIM_INFINITY else min(number, hard)
    resource.setrlimit(getattr(resource, name), (number, number))
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.stderr.write(f"{sys.argv[2]}: {error}\\n")
    sys.exit(127)
"""


class SubprocessSandbox:
    """A temporary folder, whose subfolder `box` is the workspace."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._folder = Path(tempfile.mkdtemp(prefix="unsafe-sandbox-"))
        self._box = self._folder / "box"
        self._box.mkdir()
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    async def write_files(self, files: dict[str, str]) -> None:
        """See `Sandbox`."""
        require_files(files)
        for path, text in files.items():
            try:
                write_file(str(self._box), path, text)
            except RequestError as error:
                raise ValueError(str(error)) from error

    async def read_file(self, path: str) -> str:
        """See `Sandbox`."""
        require_text(path=path)
        try:
            return read_file(str(self._box), path, READ_BYTES)
        except RequestError as error:
            raise (FileNotFoundError if error.kind == "missing" else ValueError)(str(error)) from error

    async def run_python(self, source: str, stdin: str = "") -> RunResult:
        """See `Sandbox`."""
        require_text(source=source, stdin=stdin)
        program = self._folder / "main.py"
        program.write_text(source, encoding="utf-8", errors="replace")
        return await self.run([sys.executable, "-B", str(program)], stdin)

    async def run(self, argv: list[str], stdin: str = "") -> RunResult:
        """See `Sandbox`."""
        require_argv(argv)
        require_text(stdin=stdin)
        async with self._turn:
            if self._ended:
                raise RuntimeError(f"the sandbox {self._folder} is gone: the pool was closed")
            return await asyncio.to_thread(self._run, argv, stdin)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder)

    async def end(self) -> None:
        """Kill the running program and delete the folder. Later runs raise RuntimeError."""
        self._ended = True
        if self._process is not None:
            _kill_group(self._process.pid)
        async with self._turn:
            self.remove()

    def _run(self, argv: list[str], stdin: str) -> RunResult:
        limits = {
            "RLIMIT_AS": self._config.memory_mb << 20,
            "RLIMIT_CPU": int(self._config.run_timeout_s) + 2,
            "RLIMIT_FSIZE": WORKSPACE_BYTES,
            "RLIMIT_NOFILE": 128,
            "RLIMIT_CORE": 0,
        }
        variables = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._box), "LANG": "C.UTF-8"}
        variables |= {"PYTHONPATH": str(self._box), "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "1"}
        launcher = [sys.executable, "-I", "-S", "-c", _LIMIT_AND_EXEC, json.dumps(limits), *argv]
        with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            source.write(stdin.encode("utf-8", "replace"))
            source.seek(0)
            try:
                process = self._process = subprocess.Popen(
                    launcher, stdin=source, stdout=out, stderr=err, cwd=self._box, env=variables, start_new_session=True
                )
            except (OSError, ValueError) as error:  # an argument is too long or contains a zero byte
                return RunResult(127, "", f"{argv[0]}: {error}\n")
            timed_out = False
            try:
                process.wait(self._config.run_timeout_s)
            except subprocess.TimeoutExpired:
                timed_out = True
            _kill_group(process.pid)
            code = process.wait(10.0)
            self._process = None
            return RunResult(code, _text(out), _text(err), timed_out)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    data = file.read(OUTPUT_BYTES + 1)
    text = data[:OUTPUT_BYTES].decode("utf-8", "replace")
    return text + _CUT if len(data) > OUTPUT_BYTES else text


class SubprocessPool:
    """Lends temporary folders."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._lent: set[SubprocessSandbox] = set()
        self._closed = False

    async def acquire(self) -> SubprocessSandbox:
        """See `SandboxPool`."""
        if self._closed:
            raise RuntimeError("the sandbox pool is closed")
        sandbox = SubprocessSandbox(self._config)
        self._lent.add(sandbox)
        return sandbox

    async def release(self, sandbox: Sandbox) -> None:
        """See `SandboxPool`."""
        if self._closed:
            return  # `close` deletes it
        if not isinstance(sandbox, SubprocessSandbox) or sandbox not in self._lent:
            raise ValueError(f"{sandbox!r} was not lent by this pool")
        self._lent.discard(sandbox)
        sandbox.remove()

    async def close(self) -> None:
        """See `SandboxPool`."""
        self._closed = True
        while self._lent:
            await self._lent.pop().end()
