"""Settings of the machines a run is put on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Sharing(str, Enum):
    """Which roles lie on the same GPU; the others have theirs alone."""

    none = "none"
    trainers = "trainers"  # policy, critic and reference on one, side by side
    all = "all"  # the engine too: while the others train, it gives its memory away


@dataclass
class ClusterConfig:
    """What the run may use. A run is refused when the machine has less."""

    name: str = "local"
    num_nodes: int = 1
    gpus_per_node: int = 0  # 0: everything runs on CPUs
    sharing: Sharing = Sharing.none  # of GPUs
    min_memory_gb: float = 8.0
    min_disk_gb: float = 4.0
    threads_per_process: int = 1  # OMP threads of engines and training processes on CPUs
    ray_address: str = ""  # "": start Ray here; else join this cluster
    start_timeout_s: float = 600.0  # for a process's first answer, later for a rank's micro-batch, save or publication
