"""Start of Ray on this machine, or connection to an existing Ray cluster."""

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
from launch.deaths import own_node
from launch.environment import direct, forget_other_ray, ray_environment
from launch.nodes import NodeError
from launch.supervisor import not_by_children
from machine.failures import END_TIMEOUT_S

ATTEMPTS = 3
KNOCK_TIMEOUT_S = 10.0
TOKEN_FOLDER, TOKEN_FILE = "slime-ray-", "secret"
_of_ray: set[psutil.Process] = set()  # processes of Ray's start: a killed raylet leaves its agents behind
OBJECT_STORE_MB = 512  # enough for a laptop run: a token of a sub-trace takes 18 bytes


def _of_processes(cluster: ClusterConfig) -> dict[str, str]:
    """Return the environment variables of a run's processes."""
    variables = {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without GPUs keep CUDA_VISIBLE_DEVICES untouched
        "TOKENIZERS_PARALLELISM": "false",  # no thread pool in processes that fork
        "HF_HUB_OFFLINE": "1",  # models come from folders, never from a hub at run time
    }
    if cluster.gpus_per_node == 0:
        variables["OMP_NUM_THREADS"] = str(cluster.threads_per_process)  # processes share few cores
        variables["CUDA_VISIBLE_DEVICES"] = ""  # hide GPUs that torch's CUDA build would use
    return variables


def join_ray(cluster: ClusterConfig) -> None:
    """Join the cluster at `ray_address`; this machine must be one of its nodes. NodeError: it can't be joined.

    Processes have the environment of their node's `ray start` plus the variables that a run adds.
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
            "too, and set the same RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH"
        ) from error
    finally:
        _retake_sigterm()


def _address(address: str) -> str:
    """Resolve `cluster.ray_address`: like Ray, look up "auto" in RAY_ADDRESS first."""
    return os.environ.get("RAY_ADDRESS") or address if address == "auto" else address


def _knock(address: str) -> str:
    """Return the host of an address. NodeError: it can't be connected to. Ray itself would retry for minutes."""
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
            f"cluster.ray_address={address}: can't connect ({error}); start Ray with `ray start --head`"
        ) from error


def start_ray(cluster: ClusterConfig) -> None:
    """Start or join Ray. RuntimeError: the raylet did not start in `ATTEMPTS` attempts. NodeError: see `join_ray`.

    Ray has a fixed timeout of 30 s for its raylet, which a loaded machine can miss, so the start is retried.
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
    Config.initialize("")  # read the environment again: Ray read it when it was imported
    AuthenticationTokenLoader.instance().reset_cache()
    mine = psutil.Process().children(recursive=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with not_by_children():
                ray.init(
                    address="local",  # even if another Ray instance runs on this machine
                    num_cpus=8,  # our actors request no CPUs; Ray prestarts this many workers
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
                # A failure of this start, not a mistake in the request: a launcher may try the same command again.
                raise RuntimeError(f"Ray did not start in {ATTEMPTS} attempts: {error}") from error
            time.sleep(2.0 * attempt)
        finally:  # also if a signal interrupts the start
            _retake_sigterm()
            _of_ray.update(set(psutil.Process().children(recursive=True)).difference(mine))


def _keep_quiet() -> None:
    """Disable Ray's SIGTERM handler and its messages about dead workers; launch/supervisor.py replaces both."""
    ray._private.utils.set_sigterm_handler = lambda handler: None
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _with_sigterm_retaken(call: Callable[..., None]) -> Callable[..., None]:
    def retaken(*args: Any, **options: Any) -> None:
        _retake_sigterm()
        call(*args, **options)

    return retaken


def _retake_sigterm() -> None:
    """Restore Python's SIGTERM handler: Ray's library replaces it when it starts and resets it when it ends."""
    handler = signal.getsignal(signal.SIGTERM)  # the handler registered in Python
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def stop_ray() -> None:
    """Disconnect from Ray. If this process started it, end all its processes and remove its token."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", ""))
    mine = token.parent.name.startswith(TOKEN_FOLDER)
    left = _of_ray | _processes_of_ray() if mine else set()
    node = own_node()
    if node is not None:  # ending its processes takes seconds, after the library has shut down
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
    """Create a file with the secret of a Ray instance that is about to start. It is locked while this process lives.

    Files that killed processes left behind are removed here.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{TOKEN_FOLDER}*/{TOKEN_FILE}"):
        with contextlib.suppress(OSError), old.open() as held:  # it belongs to another user or to a live run
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent, ignore_errors=True)
    token = Path(tempfile.mkdtemp(prefix=TOKEN_FOLDER)) / TOKEN_FILE
    part = token.with_suffix(".part")  # not removed as a leftover before it is locked
    part.touch(mode=0o600)
    part.write_text(secrets.token_hex(32))
    fcntl.flock(os.open(part, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_EX)
    return part.rename(token)


def _processes_of_ray() -> set[psutil.Process]:
    """Return the processes of the Ray instance that this process started, with all their descendants."""
    node = own_node()
    found: set[psutil.Process] = set()
    for _, started in node.live_processes() if node is not None else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(started.pid)
            found |= {process, *process.children(recursive=True)}
    return found
