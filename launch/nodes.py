"""Several machines: which node of a Ray cluster each process of a run lies on, and whether the nodes can serve it.

    place (arithmetic) -> find_nodes (which they are) -> look_around (what they see) -> ProcessOptions (Ray's options)

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
class Bundles:
    """Processes that are placed together: `count` bundles in rank order, each of `num_gpus` GPUs of one node."""

    name: str
    count: int
    num_gpus: int


def place(wanted: Sequence[Bundles], num_nodes: int, gpus_per_node: int) -> dict[str, list[int]]:
    """Return the node (0 ... num_nodes - 1) of every bundle, by name; within a name it never falls.

    Largest bundles first. Those of one name go whole to the first node with room for them, else they fill the nodes
    one after the other. Where the sizes divide each other (1, 2, 4, 8) that succeeds whenever anything does: the GPUs
    taken on a node are then a multiple of the present size, so the room that is left does not depend on their order.
    With `gpus_per_node` 0 nothing is counted, and nodes get about equally many processes.

    ValueError: a bundle finds no node with enough GPUs left.
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
                f"{one.count - len(nodes)} of {one.name}'s {one.count} blocks of {one.num_gpus} GPUs find no node "
                f"with as many left: {', '.join(map(str, free))} are"
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
    """Return `num_nodes` nodes of the joined cluster with `gpus_per_node` free GPUs, this one first, the others by
    address.

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
    """Return the nodes with the environment that processes need there.

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


def look(address: str, marker: str, config: str, digest: str, addresses: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Run on a node and return (what is wrong, "" for nothing; the environment that processes need here).

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
    """Return the network interface that has an address; "" when none has it by itself."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return str(name)
    return ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _on(node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


@dataclass(frozen=True)
class ProcessOptions:
    """Where one process goes, as Ray's options for its actor."""

    num_gpus: float = 0.0
    node: Node | None = None  # None: on this machine, as Ray likes

    def ray(self) -> dict[str, Any]:
        """Return the keyword arguments of `actor_class.options`."""
        found: dict[str, Any] = {"num_cpus": 0, "num_gpus": self.num_gpus}
        if self.node is None:
            return found
        if self.node.environment:
            found["runtime_env"] = {"env_vars": dict(self.node.environment)}
        return found | {"scheduling_strategy": _on(self.node)}

    @property
    def address(self) -> str:
        """Return the address that a server in this process listens on."""
        return self.node.address if self.node else LOOPBACK
