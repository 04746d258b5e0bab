"""Placement: the node and the GPUs of every process of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.config import Sharing
from launch.doctor.checks import of_nodes
from launch.nodes import Node, NodeError, ProcessOptions, find_nodes, look_around
from slime.config.nodes import (
    CRITIC,
    ENGINES,
    POLICY,
    REFERENCE,
    bundles_of,
    has_engines,
    has_reference,
    placed,
    trained_roles,
)
from slime.schema import Config
from slime.start.needs import needs, sorted_out
from trainer.config import RoleConfig

SHARE = 0.2  # fraction of a GPU that Ray assigns to each role on a shared GPU; bookkeeping only


@dataclass(frozen=True)
class Placement:
    """The placement of all processes: one entry per process, in rank order."""

    engines: tuple[ProcessOptions, ...]
    policy: tuple[ProcessOptions, ...]
    reference: tuple[ProcessOptions, ...]  # same layout as the policy
    critic: tuple[ProcessOptions, ...]
    rollout: tuple[ProcessOptions, ...]
    buffer: ProcessOptions
    spans_nodes: bool  # whether other machines can reach the run's servers
    warnings: tuple[str, ...] = ()  # of the checks of the nodes


def placement(config: Config, nodes: Sequence[Node] = ()) -> Placement:
    """Return the placement of every process of this run; roles that the run does not have get no entries.

    Without nodes, all processes run on this machine and Ray assigns their GPUs. With nodes, engines and blocks of
    ranks that share tensors are placed by `slime.config.nodes.placed`, rollout workers are placed round-robin, and
    the buffer is placed on the first node.
    """
    node_of_block = placed(config) if nodes else {}
    engine, sharing = config.rollout.engine, config.cluster.sharing

    def options(role: str, block: int, num_gpus: float) -> ProcessOptions:
        node = nodes[node_of_block[bundles_of(config, role)][block]] if nodes else None
        return ProcessOptions(num_gpus if config.cluster.gpus_per_node else 0.0, node)

    def ranks(role: str, one: RoleConfig) -> tuple[ProcessOptions, ...]:
        num_gpus, size = 1 if sharing is Sharing.none else SHARE, one.megatron.tensor_parallel
        return tuple(options(role, rank // size, num_gpus) for rank in range(one.layout.num_processes))

    trained = {role: ranks(role, one) for role, one in trained_roles(config)}
    num_engines = engine.num_engines if has_engines(config) else 0
    gpus_an_engine = SHARE if sharing is Sharing.all else engine.tensor_parallel
    return Placement(
        engines=tuple(options(ENGINES, number, gpus_an_engine) for number in range(num_engines)),
        policy=trained[POLICY],
        reference=ranks(REFERENCE, config.policy) if has_reference(config) else (),
        critic=trained.get(CRITIC, ()),
        rollout=tuple(
            ProcessOptions(0.0, nodes[number % len(nodes)] if nodes else None)
            for number in range(config.rollout.num_workers)
        ),
        buffer=ProcessOptions(0.0, nodes[0] if nodes else None),
        spans_nodes=bool(nodes),
    )


def place_run(config: Config, run_dir: Path, model_folder: Path) -> Placement:
    """Return the run's placement on this machine, or on the checked nodes of the Ray cluster that it has joined.

    NodeError: see launch/nodes.py and launch/doctor/nodes.py.
    """
    if not config.cluster.ray_address:
        return placement(config)
    nodes = look_around(find_nodes(config.cluster), run_dir, model_folder)
    found = sorted_out(of_nodes(needs(config), nodes))
    if found.problems:
        raise NodeError("; ".join(found.problems))
    return replace(placement(config, nodes), warnings=found.warnings)
