"""A node of a job's Ray: `python -m launch.slurm.node FOLDER HEAD_NODE HEAD_ADDRESS:PORT NUM_GPUS`, on every node.

Becomes `ray start`, with its output in a file of its node in FOLDER, and the secret of FOLDER's job.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.environment import forget_other_ray, ray_environment
from launch.slurm.client import addresses

NUM_CPUS = 8  # a bookkeeping number: actors ask for none, and Ray starts as many workers in advance


def log_of(folder: Path, node: str, job_id: str) -> Path:
    """Return the path of a node's log."""
    return folder / f"node_{node}_{job_id}.log"


def token_of(folder: Path, job_id: str) -> Path:
    """Return the path of the secret of a job's Ray."""
    return folder / f".ray_token_{job_id}"


def ray_command(head: str, address: str, num_gpus: int, leads: bool) -> list[str]:
    """Return the `ray start` of the node that has `address`. `leads`: it is the head, which the others find at `head`,
    HOST:PORT.
    """
    port = head.rpartition(":")[2]
    where = ["--head", f"--port={port}", "--include-dashboard=false"] if leads else [f"--address={head}"]
    program = str(Path(sys.executable).with_name("ray"))
    sizes = [f"--num-cpus={NUM_CPUS}", f"--num-gpus={num_gpus}"]
    return [program, "start", "--block", f"--node-ip-address={address}", *where, *sizes]


def own_address(known: str, peer: str) -> str:
    """Return this node's address: `known`, as Slurm has it, unless the node at `peer` would not find it there.

    A node's own name may mean its loopback, and Slurm's address one that this node does not have (behind NAT).
    """
    loopback = known.startswith("127.") and not peer.startswith("127.")
    with socket.socket() as probe:
        try:
            probe.bind((known, 0))
        except OSError:
            loopback = True
    if not loopback:
        return known
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((peer, 9))  # sends nothing: chooses the interface
        return str(route.getsockname()[0])


def main(arguments: Sequence[str]) -> None:
    """Run `ray start` in this process."""
    folder, leader, head, num_gpus = Path(arguments[0]), arguments[1], arguments[2], int(arguments[3])
    job_id, node = os.environ["SLURM_JOB_ID"], os.environ["SLURMD_NODENAME"]
    log = os.open(log_of(folder, node, job_id), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    # For all that is started from here: Slurm sends these to whole steps, and the run is still to save its state.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    forget_other_ray()
    os.environ.update(ray_environment(token_of(folder, job_id)))
    host = head.rpartition(":")[0]
    address = host if node == leader else own_address(addresses([node])[node], host)
    command = ray_command(head, address, num_gpus, node == leader)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
