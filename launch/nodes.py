"""Multi-node runs: assignment of processes to the nodes of a Ray cluster, and checks of these nodes.

    place (arithmetic) -> find_nodes (selection) -> look_around (checks on each node) -> ProcessOptions (Ray's options)

Every process is pinned to a node, so placement does not depend on Ray's scheduler. Only nodes with
`cluster.gpus_per_node` free GPUs are selected, so a run does not start on the GPUs of another run.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launch.config import ClusterConfig
from launch.environment import direct

LOOPBACK = "127.0.0.1"
NODES_WAIT_S = 60.0  # nodes of a job start at different times, and GPUs of a previous run are freed late
LOOK_WAIT_S = 120.0  # a node's first Python process may read its packages from a slow shared disk
POLL_S = 0.5
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeError(RuntimeError):
    """The cluster does not meet the run's requirements. The message is one line with the node and the cure."""


@dataclass(frozen=True)
class Bundles:
    """Processes that are placed together: `count` bundles in rank order, each with `num_gpus` GPUs of one node."""

    name: str
    count: int
    num_gpus: int


def place(wanted: Sequence[Bundles], num_nodes: int, gpus_per_node: int) -> dict[str, list[int]]:
    """Return the node (0 ... num_nodes - 1) of every bundle, by name. Within a name the node numbers never decrease.

    The largest bundles are placed first. All bundles of one name go to the first node with room for all of them;
    if there is none, they fill the nodes one after the other. If the sizes divide each other (1, 2, 4, 8), this
    succeeds whenever a placement exists: the number of used GPUs on a node is then a multiple of the current size, so
    the remaining room does not depend on the order. With `gpus_per_node` 0, GPUs are not counted and all nodes get
    about the same number of processes.

    ValueError: no node has enough free GPUs for a bundle.
    """
    total = sum(one.count * one.num_gpus for one in wanted)
    least = gpus_per_node or -(-total // num_nodes)
    for room in range(least, max(total, least) + 1):
        try:
            return _fill(wanted, [room] * num_nodes)
        except ValueError:
            if gpus_per_node:
                raise
    raise AssertionError("everything fits on one node as large as all of it")


def _fill(wanted: Sequence[Bundles], free: list[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for one in sorted(wanted, key=lambda one: (-one.num_gpus, -one.num_gpus * one.count)):
        whole = next((node for node, room in enumerate(free) if room >= one.count * one.num_gpus), None)
        nodes: list[int] = []
        for node in range(len(free)) if whole is None else (whole,):
            here = min(one.count - len(nodes), free[node] // one.num_gpus)
            free[node] -= here * one.num_gpus
            nodes += [node] * here
        if len(nodes) < one.count:
            raise ValueError(
                f"{one.count - len(nodes)} of {one.name}'s {one.count} blocks of {one.num_gpus} GPUs fit on no node; "
                f"free GPUs per node: {', '.join(map(str, free))}"
            )
        found[one.name] = nodes
    return found


@dataclass(frozen=True)
class Node:
    """A machine of a Ray cluster."""

    id: str
    address: str
    environment: Mapping[str, str] = field(default_factory=dict)  # variables that processes there need


def find_nodes(cluster: ClusterConfig, wait_s: float = NODES_WAIT_S) -> list[Node]:
    """Return `num_nodes` nodes of the joined cluster with `gpus_per_node` free GPUs: this one, then others by address.

    NodeError after `wait_s`: there are too few such nodes.
    """
    import ray
    from ray._private import state  # free resources of each node, available without Ray's dashboard

    here = ray.get_runtime_context().get_node_id()
    deadline = time.monotonic() + wait_s
    while True:
        free = {node: resources.get("GPU", 0.0) for node, resources in state.available_resources_per_node().items()}
        alive = [(node["NodeID"], str(node["NodeManagerAddress"])) for node in ray.nodes() if node["Alive"]]
        alive.sort(key=lambda node: (node[0] != here, _order(node[1])))
        fit = [Node(*node) for node in alive if free.get(node[0], 0.0) >= cluster.gpus_per_node]
        if len(fit) >= cluster.num_nodes:
            return fit[: cluster.num_nodes]
        if time.monotonic() > deadline:
            seen = ", ".join(f"{address} with {free.get(node, 0.0):g} free GPUs" for node, address in alive)
            raise NodeError(
                f"cluster.num_nodes={cluster.num_nodes} with gpus_per_node={cluster.gpus_per_node}: after {wait_s:g} s "
                f"the Ray cluster has {seen}; start Ray on more machines, or wait for the run that uses the GPUs"
            )
        time.sleep(POLL_S)


def _order(address: str) -> tuple[int, str]:
    try:
        return int(ipaddress.ip_address(address)), ""
    except ValueError:  # a name
        return 0, address


def look_around(nodes: Sequence[Node], run_dir: Path, model_folder: Path, wait_s: float = LOOK_WAIT_S) -> list[Node]:
    """Check the nodes and return them with the environment variables that processes need there.

    NodeError names a node that does not see the run's folder, can't write to it, has no model or a different one, or
    can't run this package.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    marker = run_dir.resolve() / f".seen-{secrets.token_hex(8)}"
    marker.write_text(marker.name)
    config = model_folder.resolve() / "config.json"
    addresses = [node.address for node in nodes]
    os.environ.update(direct(addresses))
    task = ray.remote(look)
    try:
        asked = [
            task.options(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node)).remote(
                node.address, str(marker), str(config), _digest(config), addresses
            )
            for node in nodes
        ]
        deadline = time.monotonic() + wait_s
        found = []
        for node, answer in zip(nodes, asked, strict=True):
            try:
                problem, environment = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except GetTimeoutError:
                problem, environment = f"has not answered in {wait_s:g} s", {}
            except RayError as error:
                problem, environment = f"can't run slime: {str(error).strip().splitlines()[-1]}", {}
            if problem:
                raise NodeError(f"node {node.address} {problem}")
            found.append(Node(node.id, node.address, environment))
        return found
    finally:
        marker.unlink(missing_ok=True)


def look(address: str, marker: str, config: str, digest: str, addresses: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Check the node that this function runs on. Return (problem or "", environment variables for processes here).

    `addresses`: the addresses of all nodes; requests between them bypass proxies.
    """
    folder = Path(marker).parent
    if not Path(marker).is_file() or Path(marker).read_text() != Path(marker).name:
        return f"does not see the run's folder {folder}: put runs_dir on a disk that all nodes mount", {}
    if not os.access(folder, os.W_OK):
        return f"may not write to the run's folder {folder}: run Ray there as the same user", {}
    if _digest(Path(config)) != digest:
        cure = "put model.path and cache_dir on a disk that all nodes mount"
        return f"does not see the model in {Path(config).parent}, or another one: {cure}", {}
    interface = interface_of(address)
    known = GLOO_INTERFACE in os.environ or not interface
    # Gloo would use the interface that the host name resolves to, which is often the loopback.
    return "", direct(addresses) | ({} if known else {GLOO_INTERFACE: interface})


def interface_of(address: str) -> str:
    """Return the network interface with exactly this address, or "" if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return str(name)
    return ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def on_node(node: Node) -> Any:
    """Return Ray's option that pins a process to a node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


@dataclass(frozen=True)
class ProcessOptions:
    """The placement of one process, convertible to Ray's options for its actor."""

    num_gpus: float = 0.0
    node: Node | None = None  # None: this machine, scheduled by Ray

    def ray(self) -> dict[str, Any]:
        """Return the keyword arguments of `actor_class.options`."""
        found: dict[str, Any] = {"num_cpus": 0, "num_gpus": self.num_gpus}
        if self.node is None:
            return found
        if self.node.environment:
            found["runtime_env"] = {"env_vars": dict(self.node.environment)}
        return found | {"scheduling_strategy": on_node(self.node)}

    @property
    def address(self) -> str:
        """Return the address that a server in this process listens on."""
        return self.node.address if self.node else LOOPBACK
