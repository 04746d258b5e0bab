"""Ray on this machine, or the cluster that is already there."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled, without stubs

from launch.config import ClusterConfig
from launch.environment import direct, forget_other_ray
from launch.nodes import NodeError
from launch.supervisor import not_by_children, own_node
from machine.failures import END_TIMEOUT_S

ATTEMPTS = 3
KNOCK_TIMEOUT_S = 10.0
TOKEN_FOLDER, TOKEN_FILE = "slime-ray-", "secret"
_of_ray: set[psutil.Process] = set()  # what its start has started: a raylet that is killed leaves its agents to nobody
OBJECT_STORE_MB = 512  # of a laptop run: a token of a sub-trace is 18 bytes


def ray_environment(token_file: Path) -> dict[str, str]:
    """Return every environment variable that a Ray which is started by us gets, with its reason."""
    return {
        "RAY_AUTH_MODE": "token",  # Ray's ports listen on all interfaces: nobody else may submit work
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine
        "RAY_DEDUP_LOGS": "1",
        # Ray's own 15 leaves a thirtieth of a core beside any busy process: training stands still.
        "RAY_worker_niceness": "5",
        "RAY_grpc_enable_http_proxy": "0",  # Ray's processes speak to each other alone
    }


def _of_processes(cluster: ClusterConfig) -> dict[str, str]:
    """Every environment variable that a run's processes get, with its reason."""
    variables = {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without GPUs keep CUDA_VISIBLE_DEVICES untouched
        "TOKENIZERS_PARALLELISM": "false",  # no thread pool in processes that fork
        "HF_HUB_OFFLINE": "1",  # models come from folders, never from a hub at run time
    }
    if cluster.gpus_per_node == 0:
        variables["OMP_NUM_THREADS"] = str(cluster.threads_per_process)  # processes share few cores
        variables["CUDA_VISIBLE_DEVICES"] = ""  # a GPU of this machine, which torch's CUDA build would use
    return variables


def join_ray(cluster: ClusterConfig) -> None:
    """Join the cluster at `ray_address`, of which this machine is a node. NodeError: it can't be joined.

    Its processes have the environment of their node's `ray start`, and what a run adds.
    """
    address = _address(cluster.ray_address)
    host = _knock(address)
    variables = _of_processes(cluster)
    os.environ.update(variables | direct([host]))
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        ray.shutdown()
        raise NodeError(
            f"cluster.ray_address={address} can't be joined: {error}; run `ray start` on this machine, "
            "too, and give both the same RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH"
        ) from error


def _address(address: str) -> str:
    """Where `cluster.ray_address` leads: Ray looks up auto in RAY_ADDRESS first."""
    return os.environ.get("RAY_ADDRESS") or address if address == "auto" else address


def _knock(address: str) -> str:
    """The host of an address. NodeError: nobody listens there. Ray itself would ask for minutes."""
    if address == "auto":
        return "localhost"
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        raise NodeError(f"cluster.ray_address={address} is not auto or the head's HOST:PORT, e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_TIMEOUT_S).close()
        return host.strip("[]")
    except OSError as error:
        raise NodeError(
            f"cluster.ray_address={address}: nobody listens there ({error}); start Ray with `ray start --head`"
        ) from error


def start_ray(cluster: ClusterConfig) -> None:
    """Start or join Ray. NodeError: the raylet did not come up in `ATTEMPTS` tries, or see `join_ray`.

    Ray gives its raylet a fixed 30 s, which a loaded machine can miss, hence the tries.
    """
    if ray.is_initialized():
        return
    _keep_quiet()
    if cluster.ray_address:
        join_ray(cluster)
        return
    forget_other_ray()
    token = _make_token()
    os.environ.update(ray_environment(token) | _of_processes(cluster) | direct([ray.util.get_node_ip_address()]))
    Config.initialize("")  # Ray read its environment when it was imported
    AuthenticationTokenLoader.instance().reset_cache()
    mine = psutil.Process().children(recursive=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with not_by_children():
                ray.init(
                    address="local",  # whatever other Ray runs on this machine
                    num_cpus=8,  # a bookkeeping number: our actors ask for none; Ray starts as many workers in advance
                    num_gpus=cluster.gpus_per_node or None,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_MB << 20,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except Exception as error:
            ray.shutdown()
            if attempt == ATTEMPTS:
                stop_ray()
                raise NodeError(f"Ray did not start in {ATTEMPTS} attempts: {error}") from error
            time.sleep(2.0 * attempt)
        finally:  # a signal may have come in the middle
            _retake_sigterm()
            _of_ray.update(set(psutil.Process().children(recursive=True)).difference(mine))


def _keep_quiet() -> None:
    """Ray would take SIGTERM for itself, and print guesses about a dead worker; launch/supervisor.py does both."""
    ray._private.utils.set_sigterm_handler = lambda handler: None
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _with_sigterm_retaken(call: Callable[..., None]) -> Callable[..., None]:
    def retaken(*args: Any, **options: Any) -> None:
        _retake_sigterm()
        call(*args, **options)

    return retaken


def _retake_sigterm() -> None:
    """Ray's library handles SIGTERM as a crash from its start on, and leaves it with the default at its end."""
    handler = signal.getsignal(signal.SIGTERM)  # as Python has it
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def stop_ray() -> None:
    """Leave Ray. Where this process started it, everything that came of it is ended, and its token removed."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", ""))
    mine = token.parent.name.startswith(TOKEN_FOLDER)
    left = _of_ray | _processes_of_ray() if mine else set()
    node = own_node()
    if node is not None:  # it takes seconds to end its processes, after the library has gone
        node.kill_all_processes = _with_sigterm_retaken(node.kill_all_processes)  # type: ignore[method-assign]
    try:
        ray.shutdown()
    finally:
        _retake_sigterm()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, END_TIMEOUT_S)
        _of_ray.clear()
        if mine:
            shutil.rmtree(token.parent, ignore_errors=True)


def _make_token() -> Path:
    """A file with the secret of a Ray that is about to start, locked while this process lives.

    Those of processes that were killed before they could remove theirs are removed here.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{TOKEN_FOLDER}*/{TOKEN_FILE}"):
        with contextlib.suppress(OSError), old.open() as held:  # another user's, or of a run that lives
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent, ignore_errors=True)
    token = Path(tempfile.mkdtemp(prefix=TOKEN_FOLDER)) / TOKEN_FILE
    part = token.with_suffix(".part")  # nobody takes it for an old one before it is locked
    part.touch(mode=0o600)
    part.write_text(secrets.token_hex(32))
    fcntl.flock(os.open(part, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_EX)
    return part.rename(token)


def _processes_of_ray() -> set[psutil.Process]:
    """Those that this process has started Ray with, and all that came of them."""
    node = own_node()
    found: set[psutil.Process] = set()
    for _, started in node.live_processes() if node is not None else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(started.pid)
            found |= {process, *process.children(recursive=True)}
    return found
