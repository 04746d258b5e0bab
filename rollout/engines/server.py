"""An SGLang server as a child process: its command line, environment, start and end."""

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
from machine.stacks import listen
from rollout.config import EngineConfig
from rollout.engines.leash import LEASH_INTERVAL_S
from rollout.sglang.options import option_arguments

HEALTH_INTERVAL_S = 0.2
LOG_TAIL_LINES = 30
STOP_TIMEOUT_S = 20.0  # for the leash to end everything
# Lines of a server's log that give the reason for its end: a crashed subprocess, an exception, a refused argument.
CRASHED = re.compile(r"Subprocess (?P<name>\S+) \(pid=\d+\) crashed with exit code (?P<code>-?\d+)")
RAISED = re.compile(r"^(?:\[.*?\] *)?(?P<reason>(?:[\w.]+(?:Error|Exception|Interrupt)\b|\S+: error:).*)$")
# SGLang reserves 6 tokens of its context; with this margin, a request may fill `context_tokens` exactly.
CONTEXT_MARGIN_TOKENS = 8
KEY_VARIABLE = "SLIME_ENGINE_KEY"
# Opens URLs of servers directly, without the proxy that the environment may set.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CPU_MEMORY_FRACTION = 0.3  # of the machine's memory; on a CPU the effective limit is `max_total_tokens`


@dataclass(frozen=True)
class ServerSettings:
    """Arguments that one server is started with."""

    config: EngineConfig
    model_path: str
    context_tokens: int
    log_path: str
    cpu: bool
    threads: int = 1  # per process of the server
    seed: int = 0
    host: str = "127.0.0.1"
    yields_memory: bool = False  # whether it can release its GPU memory (`EngineClient.release_memory`)
    key: str = field(default="", repr=False)  # API key that requests must send; "": none


def server_arguments(settings: ServerSettings, port: int) -> list[str]:
    """Return the arguments of `python -m sglang.launch_server`.

    Requests and answers are token ids. Weight versions start at 0.
    """
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
        # By default there is room for all running requests at full context, and as much again for cached prefixes.
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
    """Return the environment variables of an engine. No other code sets any."""
    config = settings.config
    variables = {
        # By default torch uses every core for one engine.
        "OMP_NUM_THREADS": str(settings.threads),
        # With CONTEXT_MARGIN_TOKENS, the context may exceed the length that the model declares.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        # The model is a local folder: never query the Hugging Face Hub, not even for optional files.
        "HF_HUB_OFFLINE": "1",
    }
    if settings.cpu:
        # SGLang imports the model classes of this package first, and all of its own only if the class is missing here.
        variables["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "rollout.sglang.cpu.models"
        if config.tensor_parallel > 1:
            # SGLang refuses more ranks than NUMA nodes unless the cores of each are given. Nothing binds to them here.
            cores = sorted(os.sched_getaffinity(0))
            bound = [str(cores[rank % len(cores)]) for rank in range(config.tensor_parallel)]
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bound)
    if settings.key:
        # Read by `serve`. Other users of the machine can see a process's arguments, but not its environment.
        variables[KEY_VARIABLE] = settings.key
    if config.delta:
        # Read by the platform plugin (rollout/sglang/platform.py), which runs before SGLang loads its model.
        variables["SLIME_ENGINE_DELTA"] = "1"
    return variables


def asks_for_key(url: str) -> bool:
    """Return whether a server refuses a request without a key."""
    try:
        with DIRECT.open(f"{url}/model_info", timeout=60):
            return False
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.UNAUTHORIZED


class EngineServer:
    """A running server. The constructor starts the process; `start` waits until it serves and returns its address.

    The server has its own process group. It ends with `stop`, with this process (even by SIGKILL), or by itself.
    Anyone who can connect to `host` can use the engine, unless it has a `key`: then, except for "/health", it answers
    only requests with the key.
    """

    def __init__(self, settings: ServerSettings) -> None:
        listen()
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

        RuntimeError with the reason if it ends; TimeoutError after `config.start_timeout_s`. Both name the log file and
        contain its last lines as a note.
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
        """Wait until the server has ended and return how: "was killed by SIGKILL ..."; "" after `stop`."""
        while self.alive():
            time.sleep(LEASH_INTERVAL_S)
        return "" if self._stopped else self._ending()

    def stop(self) -> None:
        """Kill the server and everything it started. An engine has no state to lose."""
        self._stopped = True
        if self._process.stdin is not None:
            self._process.stdin.close()  # makes the leash end everything
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_TIMEOUT_S)
        for port in self._ports:
            port.close()

    def _freeze_objects(self) -> None:
        """Exclude the objects created at start from garbage collection: a full pass over them takes 0.1 s or more.

        SGLang sends itself this request, but without a warm-up it does so before it listens.
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
        """Return how the server ended, with the reason from its log."""
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
                log.seek(self._log_begins)  # a resumed run appends to the same file
                return log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return [f"it can't be read: {error}"]


def crash_in(log: Sequence[str]) -> str:
    """Return which process of a server crashed first, and how, according to SGLang's log; "" if none did.

    SGLang then kills itself with SIGKILL, so its own exit code does not contain the reason.
    """
    found = next(filter(None, map(CRASHED.search, log)), None)
    return f"its process {found['name']} {ending(int(found['code']))}" if found else ""


def exception_in(log: Sequence[str]) -> str:
    """Return the last exception or refused argument in a server's log; "" if there is none."""
    found = [match["reason"] for match in map(RAISED.match, log) if match]
    return found[-1] if found else ""


def serve() -> None:
    """Run SGLang's server with the API key from the environment.

    SGLang's own middleware checks the key. As an argument, the key would be visible in the process list and in the log.
    """
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import add_api_key_middleware
    from starlette.routing import WebSocketRoute

    add_api_key_middleware(app, api_key=os.environ.pop(KEY_VARIABLE), admin_api_key=None)
    # The middleware does not check websockets. The engine needs none, so they are removed.
    app.router.routes[:] = [route for route in app.router.routes if not isinstance(route, WebSocketRoute)]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
