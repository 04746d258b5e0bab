"""Checks of one machine: resources, open files, ports, proxies, user namespaces, the folder of the runs."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

from launch.config import ClusterConfig
from launch.doctor.finding import Finding, Needs, ok, problem, warning
from launch.doctor.shared import existing
from launch.environment import LOOPBACKS, NO_PROXIES
from launch.nodes import LOOPBACK
from launch.preflight import Machine, problems
from machine.ports import ReservedPort

NOBODY = 65534
MIN_FILES = 4096  # Ray's raylet holds several for each worker; a sandbox takes three
NAMESPACE_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 5.0
SLOW_MB_S = 50.0  # a checkpoint of an 8B model with its optimizer takes half an hour
WRITE_BYTES = 32 << 20


def resources(cluster: ClusterConfig, machine: Machine | None = None) -> list[Finding]:
    """Check CPUs, GPUs, memory, disk, /dev/shm and temporary folders: see launch/preflight.py."""
    machine = machine or Machine.read(count_gpus=cluster.gpus_per_node > 0 and not cluster.ray_address)
    found = [one for text in problems(cluster, machine) for one in problem("resources", text)]
    gpus = f", {machine.num_gpus} GPUs" if cluster.gpus_per_node else ""
    return found or ok(
        "resources",
        f"{machine.num_cpus} CPUs{gpus}, {machine.free_memory_gb:.1f} GB of memory, {machine.free_disk_gb:.1f} GB of "
        f"disk, {machine.free_shm_gb:.1f} GB in /dev/shm",
    )


def open_files() -> list[Finding]:
    """Check the limit of open files, which every process of a run inherits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_FILES:
        return ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"limit {soft}")
    high = hard == resource.RLIM_INFINITY or hard >= MIN_FILES
    cure = f"run `ulimit -n {MIN_FILES}` before" if high else f"its hard limit is {hard}: ask an administrator for more"
    return warning("open files", f"limit {soft}, large runs need {MIN_FILES}: {cure}")


def ports(host: str = LOOPBACK) -> list[Finding]:
    """Check that a port of this machine can be taken, listened on and reached."""
    try:
        with ReservedPort(host) as kept, closing(socket.socket()) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((host, kept.number))
            server.listen(1)
            socket.create_connection((host, kept.number), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        cure = "allow local connections in the firewall or container, or end programs that hold many ports"
        return problem("ports", f"no port of {host} can be taken and reached ({error.strerror or error}): {cure}")
    return ok("ports", f"a port of {host} was taken and reached")


def proxies() -> list[Finding]:
    """Check that proxies of the environment except this machine."""
    named = [name for name, value in os.environ.items() if value and name.lower().endswith("_proxy")]
    used = sorted(name for name in named if name.lower() not in NO_PROXIES)
    if not used:
        return ok("proxies", "none set")
    excepted = ",".join(os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")).split(",")
    missing = [host for host in LOOPBACKS[:2] if host not in excepted and "*" not in excepted]
    if missing:
        hosts = ",".join(missing)
        text = f"{', '.join(used)} set without {hosts} in no_proxy: a run adds it for its own processes; for yours, "
        return warning("proxies", f"{text}export no_proxy={hosts}")
    return ok("proxies", f"{', '.join(used)}; this machine is excepted")


def namespaces(required: bool = True) -> list[Finding]:
    """Check that an unprivileged user may make a user namespace, as the sandbox of the tools does."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return warning("sandbox", "user namespaces can't be checked without the program unshare: install util-linux")
    uid = NOBODY if os.geteuid() == 0 else None  # as rollout/sandbox does for root
    try:
        done = subprocess.run(
            [unshare, "--user", "--map-root-user", "true"],
            capture_output=True,
            text=True,
            timeout=NAMESPACE_TIMEOUT_S,
            check=False,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
            cwd="/",
        )
        told = "" if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        told = str(error)
    if not told:
        return ok("sandbox", "user namespaces can be made")
    text = (
        f"no user namespaces for the sandbox ({told}): sysctl user.max_user_namespaces=15000 "
        "kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0, or a container that allows "
        "them; rollout.sandbox.allow_unsafe=true runs tools without a sandbox"
    )
    return (problem if required else warning)("sandbox", text)


def runs_folder(folder: Path, size: int = WRITE_BYTES) -> list[Finding]:
    """Check that the runs' folder can be written to, and how fast; a folder that is not there is left so."""
    there = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there, prefix=".doctor-") as file:
            began = time.perf_counter()
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
            speed = size / 1e6 / (time.perf_counter() - began)
    except OSError as error:
        cure = "choose another runs_dir, or let this user write there"
        return problem("runs folder", f"{there} can't be written to ({error.strerror or error}): {cure}")
    if speed < SLOW_MB_S and size == WRITE_BYTES:
        text = f"{there} takes {speed:.0f} MB/s, checkpoints need {SLOW_MB_S:.0f}: put runs_dir on a faster disk"
        return warning("runs folder", text)
    return ok("runs folder", f"{there} takes {speed:.0f} MB/s" if size == WRITE_BYTES else f"{there} can be written to")


def checkpoints(needs: Needs) -> list[Finding]:
    """Check that the disk holds the planned checkpoints: those that are kept, and one that is being written."""
    if not needs.checkpoint_bytes:
        return ok("checkpoints", "their size is not known before the model is made")
    there = existing(needs.runs_dir)
    free, wanted = shutil.disk_usage(there).free / 1e9, needs.checkpoint_bytes * (needs.kept + 1) / 1e9
    shown = f"{needs.kept} + 1 checkpoints take {wanted:.1f} GB, {free:.1f} GB are free in {there}"
    if wanted > free:
        return problem("checkpoints", f"{shown}: free some, choose another runs_dir, or a smaller checkpoint.keep")
    return ok("checkpoints", shown)
