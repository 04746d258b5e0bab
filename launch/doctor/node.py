"""A node's part in the checks of several nodes: an actor that Ray runs there. See launch/doctor/nodes.py."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

from launch.doctor import machine, shared, software
from launch.doctor.collective import EndedRank, commands_of_ranks, run_ranks
from launch.doctor.finding import Finding, Needs
from launch.environment import direct
from launch.nodes import GLOO_INTERFACE, interface_of
from machine.ports import ReservedPort

CONNECT_TIMEOUT_S = 10.0
CONNECTIONS = 32  # at a time


@dataclass(frozen=True)
class NodeView:
    """A node's own findings, and what is compared between nodes."""

    findings: list[Finding]
    versions: dict[str, str]
    model_digest: str  # "": no model is there


class NodeCheck:
    """The checks that run on one node."""

    def __init__(self, address: str, addresses: Sequence[str]) -> None:
        """Prepare the checks of the node that has `address`, one of `addresses`."""
        self._address = address
        self._variables = direct(addresses)
        if GLOO_INTERFACE not in os.environ and (interface := interface_of(address)):
            self._variables[GLOO_INTERFACE] = interface
        self._server: socket.socket | None = None
        self._port: ReservedPort | None = None

    def look(self, needs: Needs, has_sandboxes: bool) -> NodeView:
        """Check this machine alone. `needs` have absolute paths."""
        cluster = replace(needs.cluster, ray_address="", min_disk_gb=0.0)  # the disk of its current folder is not used
        found = [
            *software.packages(),
            *software.cuda(cluster.gpus_per_node > 0),
            *software.shadows(),
            *machine.resources(cluster),
            *machine.checkpoints(needs),
            *machine.open_files(),
            *machine.ports(self._address),
            *(machine.namespaces(needs.sandbox) if has_sandboxes else ()),
        ]
        digest = shared.digest_of_model(needs.model_folder) if needs.model_folder else ""
        return NodeView(found, software.versions(), digest)

    def clock(self) -> float:
        """Return the time of this machine's clock, seconds since 1970."""
        return time.time()

    def reply(self, offers: Sequence[shared.Offer], name: str) -> list[shared.Reply]:
        """Return this node's view of each offer."""
        return [shared.reply(one, name) for one in offers]

    def listen(self) -> int:
        """Return a port of this node's address, on which each caller is told that address."""
        self._server = socket.create_server((self._address, 0), backlog=1024)
        threading.Thread(target=self._greet, daemon=True).start()
        return int(self._server.getsockname()[1])

    def _greet(self) -> None:
        assert self._server is not None
        while True:
            caller, _ = self._server.accept()
            with caller, suppress(OSError):
                caller.sendall(self._address.encode())

    def reach(self, ports: Mapping[str, int]) -> dict[str, str]:
        """Return why addresses are not reached at their ports, by address; {} if all are."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            told = pool.map(lambda one: _greeting(*one), ports.items())
            return {address: said for address, said in zip(ports, told, strict=True) if said}

    def reserve_port(self) -> int:
        """Return a port of this node that is kept for rank 0."""
        self._port = ReservedPort(self._address)
        return self._port.number

    def run_ranks(self, ranks: Sequence[int], size: int, host: str, port: int, timeout_s: float) -> list[EndedRank]:
        """Run this node's ranks of a trial all-reduce over CPUs."""
        return self._run(commands_of_ranks(ranks, size, host, port, timeout_s, False), timeout_s)

    def run_gpu_ranks(self, ranks: Sequence[int], size: int, host: str, port: int, timeout_s: float) -> list[EndedRank]:
        """Run this node's ranks of a trial all-reduce over GPUs."""
        return self._run(commands_of_ranks(ranks, size, host, port, timeout_s, True), timeout_s)

    def _run(self, commands: list[list[str]], timeout_s: float) -> list[EndedRank]:
        return [replace(one, node=self._address) for one in run_ranks(commands, timeout_s, self._variables)]


def _greeting(address: str, port: int) -> str:
    """Say why the node at an address is not reached; "" if it is."""
    try:
        with socket.create_connection((address, port), CONNECT_TIMEOUT_S) as line:
            line.settimeout(CONNECT_TIMEOUT_S)
            said = line.recv(256).decode(errors="replace")
    except OSError as error:
        return str(error.strerror or error)
    return "" if said == address else "another machine answers"
