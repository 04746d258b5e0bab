"""Several machines: which node of a Ray cluster each process of a run lies on, and whether the nodes can serve it.

    place (arithmetic) -> find_nodes (which they are) -> look_around (what they see) -> Places (Ray's options)

Ray is told the node of every process, so nothing depends on how it spreads actors. A node counts only while it has
`cluster.gpus_per_node` GPUs free, so a run does not begin on those of another one.
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
NODES_WAIT_S = 60.0  # nodes of a job do not start in the same second, and GPUs of a run before are freed late
LOOK_WAIT_S = 120.0  # a node's first Python process reads its packages from a shared disk
POLL_S = 0.5
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeError(RuntimeError):
    """The cluster is not what the run needs: one line with the node, what is wrong and the cure."""


@dataclass(frozen=True)
class Part:
    """Processes of a role, as `count` blocks in rank order, each of `size` GPUs of one node."""

    name: str
    count: int
    size: int


def place(parts: Sequence[Part], num_nodes: int, gpus_per_node: int) -> dict[str, list[int]]:
    """The node (0 ... num_nodes - 1) of every block of every part; within a part it never falls.

    Largest blocks first. A part goes whole to the first node with room for it, else it fills the nodes one after
    the other. Where the sizes divide each other (1, 2, 4, 8) that succeeds whenever anything does: what is taken of a
    node is then a multiple of the present size, so the room that is left does not depend on what lies where. With
    `gpus_per_node` 0 nothing is counted, and nodes get about equally many processes.

    ValueError: a block finds no node with enough GPUs left.
    """
    total = sum(part.count * part.size for part in parts)
    least = gpus_per_node or -(-total // num_nodes)
    for room in range(least, max(total, least) + 1):
        try:
            return _fill(parts, [room] * num_nodes)
        except ValueError:
            if gpus_per_node:
                raise
    raise AssertionError("everything fits on one node as large as all of it")


def _fill(parts: Sequence[Part], free: list[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for part in sorted(parts, key=lambda part: (-part.size, -part.size * part.count)):
        whole = next((node for node, room in enumerate(free) if room >= part.count * part.size), None)
        blocks: list[int] = []
        for node in range(len(free)) if whole is None else (whole,):
            here = min(part.count - len(blocks), free[node] // part.size)
            free[node] -= here * part.size
            blocks += [node] * here
        if len(blocks) < part.count:
            raise ValueError(
                f"{part.count - len(blocks)} of {part.name}'s {part.count} blocks of {part.size} GPUs find no node "
                f"with as many left: {', '.join(map(str, free))} are"
            )
        found[part.name] = blocks
    return found


@dataclass(frozen=True)
class Node:
    """A machine of a Ray cluster."""

    id: str
    address: str
    environment: Mapping[str, str] = field(default_factory=dict)  # variables that processes there need


def find_nodes(cluster: ClusterConfig, wait_s: float = NODES_WAIT_S) -> list[Node]:
    """`num_nodes` nodes of the joined cluster with `gpus_per_node` free GPUs, this one first, the others by address.

    NodeError after `wait_s`: there are fewer.
    """
    import ray
    from ray._private import state  # what is free on each node, without Ray's dashboard

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
                f"the Ray cluster has {seen}; start ray on more machines, or wait for the run that has the GPUs"
            )
        time.sleep(POLL_S)


def _order(address: str) -> tuple[int, str]:
    try:
        return int(ipaddress.ip_address(address)), ""
    except ValueError:  # a name
        return 0, address


def look_around(nodes: Sequence[Node], run_dir: Path, model_folder: Path, wait_s: float = LOOK_WAIT_S) -> list[Node]:
    """The nodes with the environment that processes need there.

    NodeError names a node that does not see the run's folder, may not write there, has no or another model, or can't
    run this package.
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
            task.options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node)).remote(
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


def look(
    address: str, marker: str, config: str, digest: str, addresses: Sequence[str] = ()
) -> tuple[str, dict[str, str]]:
    """Runs on a node: (what is wrong, "" for nothing; the environment that processes need here).

    `addresses`: of all nodes, between which nothing goes through a proxy.
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
    # Gloo would take the interface of whatever the host's own name means, often the loopback.
    return "", direct(addresses) | ({} if known else {GLOO_INTERFACE: interface})


def interface_of(address: str) -> str:
    """The network interface that has an address; "" when none has it by itself."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return str(name)
    return ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _on(node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


class Places:
    """Where every process of a run goes. Without nodes: on this machine, as Ray likes."""

    def __init__(self, nodes: Sequence[Node] = (), placed: Mapping[str, Sequence[int]] | None = None) -> None:
        """`placed`: see `place`."""
        self.nodes = list(nodes)
        self._placed = dict(placed or {})

    def node(self, role: str, block: int) -> Node:
        """The node of a block of a role; roles that were not placed go round the nodes."""
        placed = self._placed.get(role)
        return self.nodes[block % len(self.nodes) if placed is None else placed[block]]

    def options(self, role: str, block: int = 0) -> dict[str, Any]:
        """Ray's options for a process of this block."""
        if not self.nodes:
            return {}
        node = self.node(role, block)
        environment = {"runtime_env": {"env_vars": dict(node.environment)}} if node.environment else {}
        return {"scheduling_strategy": _on(node), **environment}

    def address(self, role: str, block: int) -> str:
        """What a server in this block listens on."""
        return self.node(role, block).address if self.nodes else LOOPBACK
