"""What a run has to place on its nodes, and whether it can be placed."""

from __future__ import annotations

from collections.abc import Iterator

from critic.config import Baseline
from launch.config import Sharing
from launch.nodes import Part, place
from slime.schema import Config, Kind
from trainer.config import LayoutConfig

SHARED = "shared"  # the part of roles that lie on one GPU
ENGINES, POLICY, REFERENCE, CRITIC = "rollout.engine", "policy", "reference", "critic"


def layouts(config: Config) -> list[tuple[str, LayoutConfig]]:
    """Roles of training processes in a run of this kind. The last one's size is the first to give way."""
    found = [(POLICY, config.policy.layout)]
    if config.kind is Kind.ppo and config.advantage.baseline is Baseline.critic:
        found.append((CRITIC, config.critic.layout))
    return found


def parts(config: Config) -> list[Part]:
    """Every role's blocks: an engine, or ranks that share tensors. Roles that share a GPU are one part."""
    cluster, engine = config.cluster, config.rollout.engine
    found = []
    if cluster.sharing is not Sharing.none:
        found.append(Part(SHARED, 1, 1))
    else:
        trained = layouts(config)
        if config.policy.kl_coef:
            trained.append((REFERENCE, config.policy.layout))
        found += [Part(role, x.num_processes // x.tensor_parallel, x.tensor_parallel) for role, x in trained]
    if cluster.sharing is not Sharing.all:
        found.append(Part(ENGINES, engine.num_engines, engine.tensor_parallel))
    return found


def part_of(config: Config, role: str) -> str:
    """The name of the part that a role belongs to."""
    sharing = config.cluster.sharing
    shares = sharing is Sharing.all or (sharing is Sharing.trainers and role != ENGINES)
    return SHARED if shares else role


def placed(config: Config) -> dict[str, list[int]]:
    """The node of every block of every part. ValueError: see `unplaced`."""
    return place(parts(config), config.cluster.num_nodes, config.cluster.gpus_per_node)


def unplaced(config: Config) -> Iterator[str]:
    """Why the roles do not fit the nodes, though there are GPUs enough in all."""
    cluster, wanted = config.cluster, parts(config)
    if cluster.num_nodes > 1 and not cluster.ray_address:
        yield (
            f"cluster.num_nodes={cluster.num_nodes} without cluster.ray_address: start Ray on every node and give its "
            "address (docs/gpu.md, several nodes), cluster.ray_address=auto on one of them"
        )
    try:
        placed(config)
    except ValueError as error:
        largest = max(part.size for part in wanted)
        cure = f"use cluster.gpus_per_node of at least {largest}"
        if largest <= cluster.gpus_per_node:
            cure = f"the nearest that works is cluster.num_nodes={_enough(wanted, cluster.gpus_per_node)}"
        yield (
            f"{error}; cluster.num_nodes={cluster.num_nodes} with gpus_per_node={cluster.gpus_per_node}: {cure}, "
            "or choose tensor_parallel sizes that divide each other"
        )


def _enough(wanted: list[Part], gpus_per_node: int) -> int:
    """The fewest nodes that hold all parts. No block may be larger than a node."""
    blocks = sum(part.count for part in wanted)  # with a node for each, everything has its place
    for num_nodes in range(1, blocks):
        try:
            place(wanted, num_nodes, gpus_per_node)
        except ValueError:
            continue
        return num_nodes
    return blocks
