"""Pre-flight checks of this machine's resources."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from launch.config import ClusterConfig
from launch.environment import ray_folder, temporary_problems

GB = 1e9
MIN_SHM_GB = 0.25  # Ray stores its objects there; a container's default of 64 MB is too small
MIN_SHM_GPU_GB = 4.0  # with GPUs, NCCL's buffers and longer episodes need more
MIN_TEMPORARY_GB = 1.0  # Ray's session folder
_CGROUP_MEMORY = (  # (limit, usage) of this container: cgroup v2, then v1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Machine:
    """The resources that are free on a machine; sizes in GB (1e9 bytes)."""

    num_cpus: int
    free_memory_gb: float
    free_disk_gb: float  # on the disk of the current folder
    free_temporary_gb: float  # on the disk of Ray's session folder
    free_shm_gb: float  # /dev/shm
    num_gpus: int

    @staticmethod
    def read(count_gpus: bool) -> Machine:
        """Measure this machine. With `count_gpus` False, do not access GPUs and report 0."""
        return Machine(
            num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            free_memory_gb=_free_memory_bytes() / GB,
            free_disk_gb=shutil.disk_usage(".").free / GB,
            free_temporary_gb=_free_bytes(ray_folder()) / GB,
            free_shm_gb=shutil.disk_usage("/dev/shm").free / GB if Path("/dev/shm").is_dir() else 0.0,
            num_gpus=_num_gpus() if count_gpus else 0,
        )


def problems(cluster: ClusterConfig, machine: Machine | None = None) -> list[str]:
    """Return the reasons why a run can't start on this machine, one line each with the number and the cure.

    `machine` defaults to this machine. With `ray_address` the processes run elsewhere, so only the disk of the run's
    folder is checked.
    """
    joins = bool(cluster.ray_address)
    machine = machine or Machine.read(count_gpus=cluster.gpus_per_node > 0 and not joins)
    found = []
    if machine.free_disk_gb < cluster.min_disk_gb:
        found.append(
            f"{machine.free_disk_gb:.1f} GB of disk are free in {Path.cwd()}, "
            f"cluster.min_disk_gb={cluster.min_disk_gb:g}: free some or run from another folder"
        )
    if joins:
        return found
    if machine.num_gpus < cluster.gpus_per_node:
        found.append(
            f"{machine.num_gpus} GPUs found, cluster.gpus_per_node={cluster.gpus_per_node}: "
            "run on a machine with as many, or use cluster=local"
        )
    if machine.free_memory_gb < cluster.min_memory_gb:
        found.append(
            f"{machine.free_memory_gb:.1f} GB of memory are free, cluster.min_memory_gb={cluster.min_memory_gb:g}: end "
            "other programs, or, for a run that needs less, use "
            f"cluster.min_memory_gb={math.floor(10 * machine.free_memory_gb) / 10:g}"
        )
    if machine.num_cpus < cluster.threads_per_process:
        found.append(
            f"{machine.num_cpus} CPUs may be used, cluster.threads_per_process={cluster.threads_per_process}: "
            f"use at most {machine.num_cpus}"
        )
    shm = MIN_SHM_GPU_GB if cluster.gpus_per_node else MIN_SHM_GB
    if machine.free_shm_gb < shm:
        found.append(
            f"{machine.free_shm_gb:.2f} GB are free in /dev/shm, Ray needs {shm:g}: "
            "start the container with a larger one (docker run --shm-size=8g), or delete what fills it"
        )
    if unusable := temporary_problems():
        found += unusable
    elif machine.free_temporary_gb < MIN_TEMPORARY_GB:
        found.append(
            f"{machine.free_temporary_gb:.2f} GB are free in {ray_folder()}, Ray needs {MIN_TEMPORARY_GB:g}: "
            "free some or set TMPDIR to a short path on another disk"
        )
    return found


def _free_bytes(folder: Path) -> int:
    """Return the free bytes on a folder's disk, or 0 if the folder does not exist."""
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def _free_memory_bytes() -> int:
    """Return the memory that is free on the machine or below the container's limit, whichever is smaller."""
    free = psutil.virtual_memory().available
    for limit_file, use_file in _CGROUP_MEMORY:
        if Path(limit_file).is_file() and Path(use_file).is_file():
            limit, use = Path(limit_file).read_text().strip(), Path(use_file).read_text().strip()
            if limit.isdigit() and use.isdigit():
                free = min(free, max(0, int(limit) - int(use)))
            break
    return free


def _num_gpus() -> int:
    """Return the number of GPUs that processes started here would see: CUDA's count, or else nvidia-smi's."""
    if not any(Path(driver).exists() for driver in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        return 0  # no driver: skip the slow import of torch
    if find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return 0  # a driver that does not answer has no usable GPU
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
