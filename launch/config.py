"""Settings of the machines that a run uses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from machine.settings import setting


class Sharing(str, Enum):
    """The roles that share GPUs; the other roles have their own."""

    none = "none"
    trainers = "trainers"  # policy, critic and reference share GPUs
    all = "all"  # the engine, too: it releases its memory while the trainers work


@dataclass(frozen=True)
class ClusterConfig:
    """Resources that the run uses. A run is refused if the machine has less."""

    name: str = setting("local", "Name of the cluster's file, used in names and tables.")
    num_nodes: int = setting(1, "Machines that the run uses.", bounds="[1, inf)", unit="nodes")
    gpus_per_node: int = setting(
        0, "GPUs that the run uses on each node; 0: everything runs on CPUs.", bounds="[0, inf)", unit="GPUs"
    )
    sharing: Sharing = setting(Sharing.none, "Which roles are placed on the same GPU.")
    min_memory_gb: float = setting(
        8.0, "Free memory that a run needs to start, on each node.", bounds="[0, inf)", unit="GB (1e9 bytes)"
    )
    min_disk_gb: float = setting(
        4.0, "Free disk space that a run needs to start.", bounds="[0, inf)", unit="GB (1e9 bytes)"
    )
    threads_per_process: int = setting(
        1, "OpenMP threads of each engine and training process on CPUs.", bounds="[1, inf)", unit="threads"
    )
    ray_address: str = setting("", "Ray cluster to join, e.g. auto or HOST:PORT; '': start Ray on this machine.")
    start_timeout_s: float = setting(
        600.0,
        "Deadline for a process's first answer, and later for each micro-batch, save or publication of a rank.",
        bounds="(0, inf)",
        unit="s",
    )
