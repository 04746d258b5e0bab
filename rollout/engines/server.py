"""One SGLang server as a child process: its command line, environment, start and end."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from machine.failures import ending
from machine.ports import ReservedPort
from rollout.config import EngineConfig
from rollout.engines.leash import LEASH_INTERVAL_S
from rollout.sglang.options import option_arguments

HEALTH_INTERVAL_S = 0.2
LOG_TAIL_LINES = 30
STOP_TIMEOUT_S = 20.0  # for the leash to have ended everything
# A line of a server's log that says why it ended: a child of SGLang's that crashed, an exception, a refused argument.
CRASHED = re.compile(r"Subprocess (?P<name>\S+) \(pid=\d+\) crashed with exit code (?P<code>-?\d+)")
RAISED = re.compile(r"^(?:\[.*?\] *)?(?P<reason>(?:[\w.]+(?:Error|Exception|Interrupt)\b|\S+: error:).*)$")
# SGLang keeps 6 tokens of its context to itself; with these added, a request may fill `context_tokens` exactly.
CONTEXT_MARGIN_TOKENS = 8
KEY_VARIABLE = "SLIME_ENGINE_KEY"
# Opens the addresses of servers here, whatever proxy the environment names for the world outside.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CPU_MEMORY_FRACTION = 0.3  # of the machine's memory; `max_total_tokens` is the limit that counts there


@dataclass(frozen=True)
class ServerSettings:
    """What one server is started with."""

    config: EngineConfig
    model_path: str
    context_tokens: int
    log_path: str
    cpu: bool
    threads: int = 1  # of each of its processes
    seed: int = 0
    host: str = "127.0.0.1"
    yields_memory: bool = False  # it can give its GPU memory away between rollouts (`EngineClient.release_memory`)
    key: str = field(default="", repr=False)  # that requests must come with; "": none


def server_arguments(settings: ServerSettings, port: int) -> list[str]:
    """Return arguments of `python -m sglang.launch_server`. Requests and answers are token ids; versions start at 0."""
    config = settings.config
    arguments = [
        *("--model-path", settings.model_path),
        *("--host", settings.host),
        *("--port", str(port)),
        *("--context-length", str(settings.context_tokens + CONTEXT_MARGIN_TOKENS)),
        *("--max-running-requests", str(config.max_running_requests)),
        *("--random-seed", str(settings.seed)),
        *("--weight-version", "0"),
        *("--log-level-http", "warning"),
        "--skip-tokenizer-init",
        "--skip-server-warmup",
        "--sleep-on-idle",
        *("--grammar-backend", "none"),
        *("--tp-size", str(config.tensor_parallel)),
    ]
    if settings.cpu:
        # By default every running request fills its context, and as much again stays cached for turns to come.
        total_tokens = config.max_total_tokens or 2 * config.max_running_requests * settings.context_tokens
        return [
            *arguments,
            *("--device", "cpu"),
            *("--dtype", "float32"),
            *("--attention-backend", "torch_native"),
            *("--sampling-backend", "pytorch"),
            *("--mem-fraction-static", str(CPU_MEMORY_FRACTION)),
            *("--max-total-tokens", str(total_tokens)),
            "--disable-overlap-schedule",
        ]
    arguments += ["--dtype", "bfloat16"]
    arguments += ["--mem-fraction-static", str(config.memory_fraction)]
    if settings.yields_memory:
        arguments += ["--enable-memory-saver"]
    if config.max_total_tokens:
        arguments += ["--max-total-tokens", str(config.max_total_tokens)]
    return arguments


def server_environment(settings: ServerSettings) -> dict[str, str]:
    """Return environment variables of an engine, the only place that sets any."""
    config = settings.config
    variables = {
        # torch would take every core for one engine.
        "OMP_NUM_THREADS": str(settings.threads),
        # The context is CONTEXT_MARGIN_TOKENS above what requests use, so it may be above what the model declares.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        # The model is a local folder: no question to a hub, not even for optional files.
        "HF_HUB_OFFLINE": "1",
    }
    if settings.cpu:
        # The model classes that are imported at start; one that is not there makes SGLang import all its own.
        variables["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "rollout.sglang.cpu.models"
        if config.tensor_parallel > 1:
            # SGLang refuses more ranks than NUMA nodes unless each is told its cores. Nothing here binds to them.
            cores = sorted(os.sched_getaffinity(0))
            bound = [str(cores[rank % len(cores)]) for rank in range(config.tensor_parallel)]
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bound)
    if settings.key:
        # Read by `serve`. Other users of the machine see a process's arguments, not its environment.
        variables[KEY_VARIABLE] = settings.key
    if config.delta:
        # Read by the platform plugin, which nothing else reaches before SGLang loads its model.
        variables["SLIME_ENGINE_DELTA"] = "1"
    return variables


def asks_for_key(url: str) -> bool:
    """Return whether a server refuses a request that comes without a key."""
    try:
        with DIRECT.open(f"{url}/model_info", timeout=60):
            return False
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.UNAUTHORIZED


class EngineServer:
    """Starts a server with its construction; `start` returns its address.

    The server is a process group of its own and ends with `stop`, with this process (also by SIGKILL), or by itself.
    Whoever reaches `host` can use the engine, unless it has a `key`: then it answers "/health" and those who know it.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.config = settings.config
        self._key = settings.key
        self.log_path = Path(settings.log_path)
        self.name = self.log_path.stem.replace("_", " ")
        self._stopped = False
        port, meeting_port = self._ports = ReservedPort(settings.host), ReservedPort("")
        self.url = f"http://{settings.host}:{port.number}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        arguments = server_arguments(settings, port.number)
        arguments += ["--nccl-port", str(meeting_port.number), *option_arguments(self.config.options)]
        keyed = ["-c", "from rollout.engines.server import serve; serve()"]
        server = keyed if settings.key else ["-m", "sglang.launch_server"]
        self._log_begins = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout.engines.leash", sys.executable, *server, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **server_environment(settings)},
                start_new_session=True,
            )

    def start(self) -> str:
        """Wait until the server serves and return its address.

        RuntimeError with the reason when it dies; TimeoutError after `config.start_timeout_s`. Both name the log, and
        have its last lines as a note.
        """
        deadline = time.monotonic() + self.config.start_timeout_s
        while not self._healthy():
            if not self.alive():
                raise self._with_log(RuntimeError(f"{self.name} {self._ending()}, while it started"))
            if time.monotonic() > deadline:
                self.stop()
                raise self._with_log(TimeoutError(f"{self.name} is not up after {self.config.start_timeout_s:g} s"))
            time.sleep(HEALTH_INTERVAL_S)
        if self._key and not asks_for_key(self.url):
            self.stop()
            raise RuntimeError(f"{self.name} answers requests without its key; it was stopped")
        self._freeze_objects()
        return self.url

    def alive(self) -> bool:
        return self._process.poll() is None

    def watch(self) -> str:
        """Wait until the server has ended and say how: "was killed by SIGKILL ..."; "" when that was `stop`."""
        while self.alive():
            time.sleep(LEASH_INTERVAL_S)
        return "" if self._stopped else self._ending()

    def stop(self) -> None:
        """Kill the server and everything it started. Nothing is lost: an engine keeps no state."""
        self._stopped = True
        if self._process.stdin is not None:
            self._process.stdin.close()  # the leash ends all of it
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_TIMEOUT_S)
        for port in self._ports:
            port.close()

    def _freeze_objects(self) -> None:
        """Takes what was made at start out of garbage collection: a full pass over it costs a server 0.1 s and more.

        SGLang asks itself for it, but when it has skipped its warm-up it does so before it listens.
        """
        header = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(f"{self.url}/freeze_gc", method="POST", headers=header)
        with DIRECT.open(request, timeout=60) as response:
            response.read()

    def _healthy(self) -> bool:
        try:
            with DIRECT.open(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):  # not listening yet, still loading, or busy
            return False

    def _ending(self) -> str:
        """How the server ended, with the reason that its log gives."""
        how = ending(self._process.wait(STOP_TIMEOUT_S))
        log = self._log_lines()
        if child := crash_in(log):
            return f"has ended, because {child}"
        reason = exception_in(log)
        return f"{how} ({reason})" if reason else how

    def _with_log(self, error: Exception) -> Exception:
        tail = "\n".join(self._log_lines()[-LOG_TAIL_LINES:])
        error.args = (f"{error}; log: {self.log_path}",)
        error.add_note(f"last lines of {self.log_path}:\n{tail}")
        return error

    def _log_lines(self) -> list[str]:
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._log_begins)  # a run that goes on writes into the same file
                return log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return [f"it can't be read: {error}"]


def crash_in(log: Sequence[str]) -> str:
    """Return the first process of a server's that died, and how, by SGLang's log; "" for none.

    SGLang then ends itself by SIGKILL, so that its own end says nothing.
    """
    found = next(filter(None, map(CRASHED.search, log)), None)
    return f"its process {found['name']} {ending(int(found['code']))}" if found else ""


def exception_in(log: Sequence[str]) -> str:
    """Return the last exception or refused argument in a server's log; "" for none."""
    found = [match["reason"] for match in map(RAISED.match, log) if match]
    return found[-1] if found else ""


def serve() -> None:
    """Run SGLang's server for those who know the key that stands in the environment.

    It is SGLang's own check. Given as an argument, the key would stand in the list of processes and in the log.
    """
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import add_api_key_middleware
    from starlette.routing import WebSocketRoute

    add_api_key_middleware(app, api_key=os.environ.pop(KEY_VARIABLE), admin_api_key=None)
    # The check lets websockets pass; the engine needs none.
    app.router.routes[:] = [route for route in app.router.routes if not isinstance(route, WebSocketRoute)]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
