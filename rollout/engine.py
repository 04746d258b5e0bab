"""One SGLang server as a child process: its command line, environment, start and end.

Run as a program, this module is the server's leash:

    python -m rollout.engine COMMAND ARGUMENT...

runs a command that ends with the process that asked for it, however that one dies. The asker holds the write end of the
leash's standard input and never writes; when it dies, by SIGKILL too, the pipe closes and the whole process group is
killed. (The kernel's parent-death signal alone would fire when the *thread* that started a process ends, and servers
are started from short-lived ones.)
"""

from __future__ import annotations

import ctypes
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path

from buffer.ports import ReservedPort
from rollout.config import EngineConfig

HEALTH_INTERVAL_S = 0.2
LOG_TAIL_LINES = 30
LEASH_INTERVAL_S = 0.2
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# SGLang keeps 6 tokens of its context to itself; with these added, a request may fill `context_tokens` exactly.
CONTEXT_MARGIN_TOKENS = 8
KEY_VARIABLE = "SLIME_ENGINE_KEY"
# Opens the addresses of servers here, whatever proxy the environment names for the world outside.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CPU_MEMORY_FRACTION = 0.3  # of the machine's memory; `max_total_tokens` is the limit that counts there


def server_arguments(
    config: EngineConfig,
    model_path: str,
    context_tokens: int,
    host: str,
    port: int,
    cpu: bool,
    seed: int,
    yields_memory: bool = False,
) -> list[str]:
    """Arguments of `python -m sglang.launch_server`. Requests and answers are token ids; versions start at 0.

    `yields_memory`: the engine can give its GPU memory away between rollouts (`EngineClient.release_memory`).
    """
    arguments = [
        *("--model-path", model_path),
        *("--host", host),
        *("--port", str(port)),
        *("--context-length", str(context_tokens + CONTEXT_MARGIN_TOKENS)),
        *("--max-running-requests", str(config.max_running_requests)),
        *("--random-seed", str(seed)),
        *("--weight-version", "0"),
        *("--log-level-http", "warning"),
        "--skip-tokenizer-init",
        "--skip-server-warmup",
        "--sleep-on-idle",
        *("--grammar-backend", "none"),
        *("--tp-size", str(config.tensor_parallel)),
    ]
    if cpu:
        # By default every running request fills its context, and as much again stays cached for turns to come.
        total_tokens = config.max_total_tokens or 2 * config.max_running_requests * context_tokens
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
    if config.attention:
        arguments += ["--attention-backend", config.attention]
    if yields_memory:
        arguments += ["--enable-memory-saver"]
    if config.max_total_tokens:
        arguments += ["--max-total-tokens", str(config.max_total_tokens)]
    return arguments


def server_environment(config: EngineConfig, cpu: bool, threads: int, key: str = "") -> dict[str, str]:
    """Environment variables of an engine, the only place that sets any."""
    variables = {
        # torch would take every core for one engine.
        "OMP_NUM_THREADS": str(threads),
        # The context is CONTEXT_MARGIN_TOKENS above what requests use, so it may be above what the model declares.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        # The model is a local folder: no question to a hub, not even for optional files.
        "HF_HUB_OFFLINE": "1",
    }
    if cpu:
        # The model classes that are imported at start; one that is not there makes SGLang import all its own.
        variables["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "rollout.cpu.models"
        if config.tensor_parallel > 1:
            # SGLang refuses more ranks than NUMA nodes unless each is told its cores. Nothing here binds to them.
            cores = sorted(os.sched_getaffinity(0))
            bound = [str(cores[rank % len(cores)]) for rank in range(config.tensor_parallel)]
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bound)
    if key:
        # Read by `serve`. Other users of the machine see a process's arguments, not its environment.
        variables[KEY_VARIABLE] = key
    if config.delta:
        # Read by the platform plugin, which nothing else reaches before SGLang loads its model.
        variables["SLIME_ENGINE_DELTA"] = "1"
    return variables


def asks_for_key(url: str) -> bool:
    """Whether a server refuses a request that comes without a key."""
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

    def __init__(
        self,
        config: EngineConfig,
        model_path: str,
        context_tokens: int,
        log_path: str,
        cpu: bool,
        threads: int = 1,
        seed: int = 0,
        host: str = "127.0.0.1",
        yields_memory: bool = False,
        key: str = "",
    ) -> None:
        self.config = config
        self._key = key
        self.log_path = Path(log_path)
        port, meeting_port = self._ports = ReservedPort(host), ReservedPort("")
        self.url = f"http://{host}:{port.number}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        arguments = server_arguments(config, model_path, context_tokens, host, port.number, cpu, seed, yields_memory)
        arguments += ["--nccl-port", str(meeting_port.number)]
        server = ["-c", "from rollout.engine import serve; serve()"] if key else ["-m", "sglang.launch_server"]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout.engine", sys.executable, *server, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **server_environment(config, cpu, threads, key)},
                start_new_session=True,
            )

    def start(self) -> str:
        """Waits until the server serves and returns its address.

        RuntimeError with the log's last lines when it dies; TimeoutError after `config.start_timeout_s`.
        """
        deadline = time.monotonic() + self.config.start_timeout_s
        while not self._healthy():
            if not self.alive():
                raise RuntimeError(f"the engine died while it started; {self._log_tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise TimeoutError(f"the engine is not up after {self.config.start_timeout_s} s; {self._log_tail()}")
            time.sleep(HEALTH_INTERVAL_S)
        if self._key and not asks_for_key(self.url):
            self.stop()
            raise RuntimeError("the engine answers requests without its key; it was stopped")
        self._freeze_objects()
        return self.url

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Kills the server and everything it started. Nothing is lost: an engine keeps no state."""
        if self.alive():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)
        if self._process.stdin is not None:
            self._process.stdin.close()
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

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"last lines of {self.log_path}:", *lines])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hold(command: list[str]) -> None:
    """Runs `command` until it ends or standard input closes, then kills the process group, itself included."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    while child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], LEASH_INTERVAL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    if child.returncode is not None:
        print(f"the server ended with exit code {child.returncode}", file=sys.stderr, flush=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def serve() -> None:
    """SGLang's server, for those who know the key that stands in the environment.

    It is SGLang's own check. Given as an argument, the key would stand in the list of processes and in the log.
    """
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import add_api_key_middleware
    from starlette.routing import WebSocketRoute

    add_api_key_middleware(app, api_key=os.environ.pop(KEY_VARIABLE), admin_api_key=None)
    # The check lets websockets pass; the engine needs none.
    app.router.routes[:] = [route for route in app.router.routes if not isinstance(route, WebSocketRoute)]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    hold(sys.argv[1:])
