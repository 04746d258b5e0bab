"""What a run has to place on its nodes, and whether it can be placed."""

from __future__ import annotations

from collections.abc import Iterator

from critic.config import Baseline
from launch.config import Sharing
from launch.nodes import Bundles, place
from slime.schema import Config, Kind
from trainer.config import Precision, RoleConfig

SHARED = "shared"  # the bundles of roles that share one GPU
ENGINES, POLICY, REFERENCE, CRITIC = "rollout.engine", "policy", "reference", "critic"


def trained_roles(config: Config) -> list[tuple[str, RoleConfig]]:
    """Return roles of training processes in a run of this kind. The last one's size is the first to give way."""
    found: list[tuple[str, RoleConfig]] = [(POLICY, config.policy)]
    if config.kind is Kind.ppo and config.advantage.baseline is Baseline.critic:
        found.append((CRITIC, config.critic))
    return found


def has_engines(config: Config) -> bool:
    """Return whether a run uses engines. A warm start does not: it trains on demonstrations."""
    return config.kind is Kind.ppo


def has_reference(config: Config) -> bool:
    """Return whether the starting model is also loaded as a reference."""
    return config.kind is Kind.ppo and config.policy.kl_coef > 0


def bundles(config: Config) -> list[Bundles]:
    """Return the bundles of all roles. A bundle is an engine, or the ranks that share tensors.

    Roles that share a GPU share one bundle.
    """
    cluster, engine = config.cluster, config.rollout.engine
    found = []
    if cluster.sharing is not Sharing.none:
        found.append(Bundles(SHARED, 1, 1))
    else:
        trained = trained_roles(config)
        if has_reference(config):
            trained.append((REFERENCE, config.policy))
        for role, one in trained:
            size = one.megatron.tensor_parallel
            found.append(Bundles(role, one.layout.num_processes // size, size))
    if cluster.sharing is not Sharing.all and has_engines(config):
        found.append(Bundles(ENGINES, engine.num_engines, engine.tensor_parallel))
    return found


def bundles_of(config: Config, role: str) -> str:
    """Return the name of the bundles that contain a role's processes."""
    sharing = config.cluster.sharing
    shares = sharing is Sharing.all or (sharing is Sharing.trainers and role != ENGINES)
    return SHARED if shares else role


def placed(config: Config) -> dict[str, list[int]]:
    """Return the node of every bundle, by name. ValueError: see `unplaced`."""
    return place(bundles(config), config.cluster.num_nodes, config.cluster.gpus_per_node)


def unplaced(config: Config) -> Iterator[str]:
    """Yield why the roles do not fit on the nodes even if the total number of GPUs suffices."""
    cluster, wanted = config.cluster, bundles(config)
    if cluster.num_nodes > 1 and not cluster.ray_address:
        yield (
            f"cluster.num_nodes={cluster.num_nodes} without cluster.ray_address: start Ray on every node and give its "
            "address (docs/gpu.md, several nodes), cluster.ray_address=auto on one of them"
        )
    try:
        placed(config)
    except ValueError as error:
        largest = max(one.num_gpus for one in wanted)
        cure = f"use cluster.gpus_per_node of at least {largest}"
        if largest <= cluster.gpus_per_node:
            cure = f"the nearest that works is cluster.num_nodes={_enough(wanted, cluster.gpus_per_node)}"
        yield (
            f"{error}; cluster.num_nodes={cluster.num_nodes} with gpus_per_node={cluster.gpus_per_node}: {cure}, "
            "or choose tensor_parallel sizes that divide each other"
        )


def _enough(wanted: list[Bundles], gpus_per_node: int) -> int:
    """Return the smallest number of nodes with room for all bundles. Each bundle must fit on one node."""
    most = sum(one.count for one in wanted)  # a node for each holds everything
    for num_nodes in range(1, most):
        try:
            place(wanted, num_nodes, gpus_per_node)
        except ValueError:
            continue
        return num_nodes
    return most


def crowded(config: Config) -> Iterator[str]:
    """Yield why the roles can't get their GPUs, or why their settings do not work on CPUs."""
    cluster, engine = config.cluster, config.rollout.engine
    if cluster.gpus_per_node == 0:
        if cluster.sharing is not Sharing.none:
            yield (
                f"cluster.sharing={cluster.sharing.value} is of GPUs, cluster.gpus_per_node=0: use cluster.sharing=none"
            )
        for role, one in trained_roles(config):
            if one.layout.precision is Precision.bf16:
                yield (
                    f"{role}.layout.precision=bf16 on CPUs (cluster.gpus_per_node=0) is some 40 times slower "
                    "than fp32 without AMX: use fp32"
                )
        yield from unplaced(config)
        return
    if cluster.sharing is not Sharing.none:
        yield from _shared_gpu(config)
        yield from unplaced(config)
        return
    sizes = [(f"{role}.megatron", one.megatron.tensor_parallel) for role, one in trained_roles(config)]
    if has_engines(config):
        sizes.insert(0, (ENGINES, engine.tensor_parallel))
    for key, size in sizes:
        if size > cluster.gpus_per_node:
            yield (
                f"{key}.tensor_parallel={size} would leave the node: cluster.gpus_per_node={cluster.gpus_per_node}; "
                f"use at most {cluster.gpus_per_node}"
            )
    roles = [
        (f"{role}.layout.num_processes", one.layout.num_processes, copies, one.row_size)
        for (role, one), copies in zip(trained_roles(config), (2 if has_reference(config) else 1, 1), strict=False)
    ]  # the policy's reference, with a KL, is as large as the policy
    if has_engines(config):
        size = engine.tensor_parallel
        roles.insert(0, ("rollout.engine.num_engines", engine.num_engines, size, size))
    gpus = cluster.gpus_per_node * cluster.num_nodes
    needed = sum(count * each for _, count, each, _ in roles)
    if needed <= gpus:
        yield from unplaced(config)
        return
    cure = f"use cluster.gpus_per_node of at least {-(-needed // cluster.num_nodes)}"
    for key, count, each, multiple in reversed(roles):  # the last role that can give way alone
        left = gpus - (needed - count * each)
        if left >= multiple:
            cure = f"the nearest that works is {key}={left // multiple * multiple // each}"
            break
    parts = " + ".join(f"{count * each} ({key.removesuffix('.layout.num_processes')})" for key, count, each, _ in roles)
    yield (
        f"{parts} = {needed} GPUs, cluster.gpus_per_node*num_nodes={cluster.gpus_per_node}*{cluster.num_nodes}={gpus}: "
        f"{cure}"
    )


def _shared_gpu(config: Config) -> Iterator[str]:
    """Yield why these roles can't share one GPU."""
    cluster, engine = config.cluster, config.rollout.engine
    counts = {f"{role}.layout.num_processes": one.layout.num_processes for role, one in trained_roles(config)}
    if cluster.sharing is Sharing.all and has_engines(config):
        counts["rollout.engine.num_engines"] = engine.num_engines
        counts["rollout.engine.tensor_parallel"] = engine.tensor_parallel
        if engine.delta:
            yield "rollout.engine.delta=true with cluster.sharing=all: engines lose their weights each step, use false"
        if config.buffer.slots != config.buffer.episodes_per_step:
            yield (
                f"buffer.slots={config.buffer.slots} with cluster.sharing=all: engines stand still while a step is "
                f"trained, use buffer.episodes_per_step={config.buffer.episodes_per_step}"
            )
    for key, count in counts.items():
        if count != 1:
            yield f"{key}={count} with cluster.sharing={cluster.sharing.value}: these roles share one GPU, use 1"
    alone = cluster.sharing is Sharing.trainers and has_engines(config)
    needed = 1 + (engine.num_engines * engine.tensor_parallel if alone else 0)
    if needed > cluster.gpus_per_node * cluster.num_nodes:
        yield f"{needed} GPUs are needed, cluster.gpus_per_node={cluster.gpus_per_node}: use at least {needed}"
