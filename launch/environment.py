"""Environment variables that affect how the processes of a run connect to each other.

Proxies: variables like `http_proxy` are for external services (Weights & Biases, a user's judge). Requests between
the processes of a run must not use a proxy, so the run's own addresses are added to `no_proxy`.

Ray: variables of another Ray cluster would make a Ray instance that is started here join that cluster. RAY_SETTINGS
are those of every Ray instance that is started for a run, on one machine, in a Slurm job or in pods.

Temporary folders: they contain sockets, and the kernel limits the length of a socket's path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

LOOPBACKS = ("localhost", "127.0.0.1", "::1")
NO_PROXIES = ("no_proxy", "no_grpc_proxy")

# Variables that select a Ray cluster, the credentials for it and the setup of its jobs.
OTHER_RAY = (
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN",  # takes precedence over RAY_AUTH_TOKEN_PATH
    "RAY_CLIENT_MODE",
    "RAY_GCS_SERVER_PORT",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",  # set by `ray job submit`
    "RAY_JOB_ID",
    "RAY_NAMESPACE",
    "RAY_NODE_ID",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING",
    "RAY_OVERRIDE_RESOURCES",
    "RAY_RAYLET_PID",
    "RAY_REDIS_ADDRESS",
    "RAY_RUNTIME_ENV",
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_USE_TLS",  # with certificates for that cluster's hosts
    "RAY_gcs_storage",
)

RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",  # Ray listens on all interfaces; other users must not submit work
    "RAY_USAGE_STATS_ENABLED": "0",  # send no data to other machines
    "RAY_DEDUP_LOGS": "1",
    # With Ray's default of 15, a busy process next to a worker leaves it 1/30 of a core, and training stalls.
    "RAY_worker_niceness": "5",
    "RAY_grpc_enable_http_proxy": "0",  # Ray's processes connect only to each other
}

SOCKET_PATH_BYTES = 107  # size of Linux's sun_path without the final zero byte
# The longest socket path below Ray's temporary folder; %s: a process id.
RAY_SOCKET = "/ray/session_2026-01-31_23-59-59_999999_%s/sockets/plasma_store"
# The longest socket path below Python's temporary folder: multiprocessing's. SGLang's and W&B's are shorter.
PYTHON_SOCKET = "/pymp-12345678/listener-12345678"


def direct(addresses: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that exclude these hosts and this machine from proxying. Return {} if no proxy is set.

    Both spellings are set because some programs read only one of them. The user's own exceptions are kept.
    """
    known = os.environ if environment is None else environment
    named = {name.lower() for name, value in known.items() if value and name.lower().endswith("_proxy")}
    if not named.difference(NO_PROXIES):
        return {}
    hosts = dict.fromkeys((*LOOPBACKS, *addresses))
    variables = {}
    for name in NO_PROXIES:
        lower, upper = known.get(name, ""), known.get(name.upper(), "")
        if name != NO_PROXIES[0] and not lower and not upper:
            continue  # gRPC then reads no_proxy
        for spelling, listed in ((name, lower or upper), (name.upper(), upper or lower)):
            entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
            # Python treats "*" as every host only if it is the only entry.
            variables[spelling] = "*" if "*" in entries else ",".join(dict.fromkeys((*entries, *hosts)))
    return variables


def ray_environment(token_file: Path) -> dict[str, str]:
    """Return the environment variables of a Ray instance that we start with the secret in `token_file`."""
    return {**RAY_SETTINGS, "RAY_AUTH_TOKEN_PATH": str(token_file)}


def forget_other_ray() -> None:
    """Remove the variables of another Ray cluster from the environment before Ray is started here.

    Ray reads some variables when it is imported, so call this before the import. Variables that name an empty folder
    are removed, too, because Ray would use the empty name.
    """
    for name in OTHER_RAY:
        os.environ.pop(name, None)
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # `uv run`: Ray would copy the current folder, models and all
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if not os.environ.get(name):
            os.environ.pop(name, None)


def expand(path: str) -> str:
    """Return a path with `~` and `$VARIABLE` expanded; shells do not expand them after "=" or in quotes.

    ValueError: the user or the variable does not exist.
    """
    found = os.path.expanduser(os.path.expandvars(path))
    if found.startswith("~"):
        raise ValueError(f"{path} starts with the home folder of a user that does not exist on this machine")
    if unknown := re.search(r"\$(\w+|\{\w+\})", found):
        raise ValueError(f"{path}: no environment variable {unknown[0]}")
    return found


def ray_folder() -> Path:
    """Return the folder in which Ray creates its session folder, by Ray's own rule."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def temporary_problems() -> list[str]:
    """Return the reasons why Ray, the engines or a worker can't use the temporary folders, one line each."""
    digits = Path("/proc/sys/kernel/pid_max").read_text().strip()
    python = "TMPDIR", os.environ.get("TMPDIR", ""), PYTHON_SOCKET
    ray = "RAY_TMPDIR", os.environ.get("RAY_TMPDIR", ""), RAY_SOCKET % digits
    folders = [python, ray] if ray[1] else [(python[0], python[1], ray[2])]
    return [problem for name, value, socket in folders if value and (problem := _problem(name, value, socket))]


def _problem(name: str, value: str, socket: str) -> str:
    folder, room = Path(value), SOCKET_PATH_BYTES - len(socket)
    size = len(value.removesuffix("/"))
    if not folder.is_absolute():
        return f"{name}={value} is not an absolute path: set it to one, or unset it to use /tmp"
    if not value.isascii():
        return f"{name}={value} has non-ASCII characters, which Ray refuses: choose another folder"
    if not folder.is_dir():
        return f"{name}={value}: no such folder; make it, or unset {name} to use /tmp"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{name}={value}: this user may not write there; choose another folder, or unset {name} to use /tmp"
    if size > room:
        return (
            f"{name}={value} has {size} characters, but paths of the sockets below it are limited to "
            f"{SOCKET_PATH_BYTES}: use at most {room}, e.g. {name}=/tmp"
        )
    return ""
