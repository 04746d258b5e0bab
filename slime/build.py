"""Construction of a run's objects. Only this file chooses the class of each object that the loop uses."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from buffer.actor import BufferActor
from buffer.handle import BufferHandle
from critic.config import Baseline, CriticConfig
from critic.estimators import CriticEstimator, EpisodeEstimator, Estimator
from critic.group import CriticGroup
from critic.worker import CriticWorker
from launch.config import Sharing
from launch.deaths import Effect, watch
from launch.nodes import ProcessOptions
from machine.actors import call, handle
from machine.waits import answers, numbered
from rollout.engines.group import EngineGroup
from rollout.engines.server import EngineServer, ServerSettings
from rollout.group import RolloutGroup
from rollout.worker import RolloutSettings, RolloutWorker, worker_name
from slime.config.nodes import CRITIC, POLICY, REFERENCE
from slime.recovery.ranks import Builder
from slime.run import Roles, Run
from slime.schema import Config
from slime.start.placement import Placement
from slime.start.prepare import Prepared
from slime.weights import SharedGpuWeights, Weights
from trainer.config import Offload, PolicyConfig
from trainer.engine import EngineSettings
from trainer.group import NoReference, PolicyGroup, SharedDevice, WorkerGroup
from trainer.policy import PolicyWorker

SERVER_CALLS = 4  # an engine's actor must accept `stop` while it watches or starts
ASYNC_CALLS = 1024  # concurrent calls of an asynchronous actor: each episode of a rollout worker may wait in one


def _ranks(
    config: Config, name: str, role: PolicyConfig | CriticConfig, folder: Path, where: Sequence[ProcessOptions]
) -> list[ActorHandle[Any]]:
    """Return one actor for each process of a training role, not started."""
    cls = ray.remote(CriticWorker if isinstance(role, CriticConfig) else PolicyWorker)
    threads, timeout_s = config.cluster.threads_per_process, config.cluster.start_timeout_s

    def settings(rank: int) -> EngineSettings:
        frozen = name == REFERENCE
        return EngineSettings(
            rank,
            role.layout,
            role.megatron,
            role.optimizer,
            str(folder.resolve()),
            config.seed,
            threads,
            timeout_s,
            frozen,
            role.engine.options,
        )

    ranks = [cls.options(**options.ray()).remote(settings(rank), role) for rank, options in enumerate(where)]
    return [watch(f"{name} rank {rank}", actor, effect=Effect.RESTART) for rank, actor in enumerate(ranks)]


def build_policy(config: Config, folder: Path, where: Placement) -> PolicyGroup:
    """Return the policy's ranks, not started."""
    ranks = _ranks(config, POLICY, config.policy, folder, where.policy)
    return PolicyGroup(ranks, config.policy, config.cluster.start_timeout_s)


def build_reference(config: Config, folder: Path, where: Placement) -> PolicyGroup | NoReference:
    """Return the frozen starting model in the policy's layout, not started, or `NoReference` if policy.kl_coef is 0."""
    if not config.policy.kl_coef:
        return NoReference()
    ranks = _ranks(config, REFERENCE, config.policy, folder, where.reference)
    return PolicyGroup(ranks, config.policy, config.cluster.start_timeout_s, REFERENCE)


def build_estimator(config: Config, folder: Path, where: Placement) -> Estimator:
    """Return the critic's ranks, not started, or a baseline that needs none."""
    if config.advantage.baseline is not Baseline.critic:
        return EpisodeEstimator(config.advantage)
    ranks = _ranks(config, CRITIC, config.critic, folder, where.critic)
    return CriticEstimator(CriticGroup(ranks, config.critic, config.cluster.start_timeout_s), config.advantage)


def build_server(
    config: Config, folder: Path, run_dir: Path, where: Placement, number: int, *, key: str = ""
) -> ActorHandle[EngineServer]:
    """Return an engine server, which starts its SGLang process when constructed. `key`: see `ServerSettings`."""
    options, shared = where.engines[number], config.cluster.sharing is Sharing.all
    log = engine_log(run_dir, number)
    cls = ray.remote(EngineServer).options(max_concurrency=SERVER_CALLS, **options.ray())
    settings = ServerSettings(
        config.rollout.engine,
        str(folder.resolve()),
        config.rollout.compaction.context_tokens,
        str(log.resolve()),
        cpu=config.cluster.gpus_per_node == 0,
        threads=config.cluster.threads_per_process,
        seed=config.seed + number,
        host=options.address,
        key=key,
        yields_memory=shared,
    )
    server = handle(cls.remote(settings))
    # Another engine could not start on a GPU whose memory training may use at that time.
    effect = Effect.END if shared else Effect.REPLACE
    return watch(f"engine {number}", server, call(server, EngineServer.watch), str(log), effect=effect)


def engine_log(run_dir: Path, number: int) -> Path:
    """Return the path of an engine's log."""
    return run_dir / "logs" / f"engine_{number}.log"


def list_engines(config: Config, inputs: Prepared, urls: Sequence[str], key: str = "") -> EngineGroup:
    """Return the engines that serve at `urls`. `key`: the API key that they were started with."""
    window = config.rollout.compaction.context_tokens
    return EngineGroup(tuple(urls), inputs.vocab_size, window, config.rollout.engine, key)


def build_worker(
    config: Config, inputs: Prepared, engines: EngineGroup, where: Placement, number: int
) -> ActorHandle[RolloutWorker]:
    """Return a rollout worker, not started."""
    cls = ray.remote(RolloutWorker).options(max_concurrency=ASYNC_CALLS, **where.rollout[number].ray())
    settings = RolloutSettings(
        name=worker_name(number),
        config=config.rollout,
        task=inputs.task,
        model_folder=str(inputs.model_folder.resolve()),
        template=config.model.template,
        engines=engines,
        seed=config.seed,
    )
    worker = cls.remote(settings, ray.put(inputs.train_rows), ray.put(inputs.eval_rows))
    return watch(f"rollout worker {number}", worker, effect=Effect.REPLACE)


def build_rollout(config: Config, inputs: Prepared, engines: EngineGroup, where: Placement) -> RolloutGroup:
    """Return the rollout workers, not started."""
    workers = [build_worker(config, inputs, engines, where, number) for number in range(len(where.rollout))]
    return RolloutGroup(workers, max(config.rollout.engine.request_timeout_s, config.buffer.take_timeout_s))


def build_weights(config: Config, roles: Roles, engines: EngineGroup) -> Weights:
    """Return the publisher of weights from the policy to the engines, not connected."""
    limit_s = config.cluster.start_timeout_s
    if config.cluster.sharing is Sharing.all:
        return SharedGpuWeights(roles.policy, engines, limit_s, roles.groups)
    return Weights(roles.policy, engines, "nccl" if config.cluster.gpus_per_node else "gloo", limit_s)


def share_devices(config: Config, trainers: Sequence[WorkerGroup]) -> None:
    """Serialize the roles that share a GPU if one of them offloads its memory while it does not work."""
    if config.cluster.sharing is not Sharing.none and any(one.layout.offload is Offload.role for one in trainers):
        device = SharedDevice()
        for one in trainers:
            one.shared_device = device


def build_roles(config: Config, folder: Path, where: Placement) -> Roles:
    """Return the processes that hold a model, not started."""
    roles = Roles(
        build_policy(config, folder, where),
        build_reference(config, folder, where),
        build_estimator(config, folder, where),
    )
    share_devices(config, roles.groups)
    return roles


def start_roles(config: Config, folder: Path, where: Placement) -> Roles:
    """Build the processes that hold a model, start them and wait until all of them answer."""
    limit_s = config.cluster.start_timeout_s
    roles = build_roles(config, folder, where)
    for pending in [group.start(limit_s) for group in roles.groups]:
        pending.result(limit_s)
    return roles


def build_buffer(config: Config, num_rows: int, where: Placement) -> BufferHandle:
    """Return the data buffer, empty."""
    cls = ray.remote(BufferActor).options(max_concurrency=ASYNC_CALLS, **where.buffer.ray())
    actor = cls.remote(config.buffer, num_rows, config.seed)
    return BufferHandle(watch("the data buffer", actor, effect=Effect.RESTART))


def rebuilder(config: Config, inputs: Prepared, run_dir: Path, where: Placement, run: Run) -> Builder:
    """Return the constructors of the processes that a running job may start again."""
    return Builder(
        engine=partial(build_server, config, inputs.model_folder, run_dir, where, key=run.engines.key),
        worker=partial(build_worker, config, inputs, run.engines, where),
        roles=partial(start_roles, config, inputs.model_folder, where),
        buffer=partial(build_buffer, config, len(inputs.train_rows), where),
    )


def build(config: Config, inputs: Prepared, run_dir: Path, where: Placement) -> Run:
    """Start all processes in parallel and wait until all of them answer."""
    limit_s, engine = config.cluster.start_timeout_s, config.rollout.engine
    key = secrets.token_hex(32) if where.spans_nodes else ""  # engines that other machines can reach require a key
    folder, numbers = inputs.model_folder, range(len(where.engines))
    servers = [build_server(config, folder, run_dir, where, number, key=key) for number in numbers]
    roles = build_roles(config, folder, where)
    starting = [group.start(limit_s) for group in roles.groups]
    buffer = build_buffer(config, len(inputs.train_rows), where)
    # Each server enforces its own deadline and reports its log; this deadline covers the actors around them.
    serving = [call(server, EngineServer.start) for server in servers]
    urls = answers("start", numbered("engine", servers), serving, limit_s + engine.start_timeout_s)
    engines = list_engines(config, inputs, urls, key)
    rollout = build_rollout(config, inputs, engines, where)
    ready = rollout.start()
    for pending in starting:
        pending.result(limit_s)
    rollout.started(ready, limit_s)
    weights = build_weights(config, roles, engines)
    weights.connect()
    return Run(buffer, rollout, engines, roles, weights, servers, folder, inputs.rows_digest)
