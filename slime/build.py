"""Which objects a run is made of. Here, and only here, is chosen what the loop then calls by one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from buffer.actor import BufferActor
from critic.config import Baseline, CriticConfig
from critic.estimators import CriticEstimator, EpisodeEstimator, Estimator
from critic.group import CriticGroup
from critic.worker import CriticWorker
from launch.config import Sharing
from rollout.engine import EngineServer
from rollout.group import EngineGroup, RolloutGroup
from rollout.worker import RolloutSettings, RolloutWorker
from slime.prepare import Prepared
from slime.schema import Config
from slime.weights import SharedGpuWeights, Weights
from trainer.config import Offload, PolicyConfig
from trainer.group import NoReference, PolicyGroup, Turns, WorkerGroup
from trainer.policy import PolicyWorker
from trainer.worker import WorkerSettings

ASYNC_CALLS = 1024  # calls an asynchronous actor serves at once: every lane of a rollout worker may wait in one


@dataclass
class Parts:
    """A run's running parts."""

    buffer: Any
    rollout: RolloutGroup
    engines: EngineGroup
    policy: PolicyGroup
    reference: PolicyGroup | NoReference
    estimator: Estimator
    weights: Weights
    servers: list[Any]
    trainers: list[WorkerGroup]  # all groups of processes that hold a model, a frozen one among them
    model_folder: Path  # what the run started from

    @property
    def roles(self) -> list[WorkerGroup]:
        """Groups of processes that train: what a checkpoint holds."""
        return [self.policy, *self.estimator.roles]

    def stop(self) -> None:
        """Ends engines and sandboxes; Ray's own end takes the rest."""
        self.rollout.stop()
        ray.get([server.stop.remote() for server in self.servers], timeout=60)


SHARE = 0.2  # of a GPU that engine, policy, reference and critic share: a bookkeeping number of Ray's


def _gpus(config: Config, shared_by: Sequence[Sharing], each: int = 1) -> float:
    if not config.cluster.gpus_per_node:
        return 0
    return SHARE if config.cluster.sharing in shared_by else each


def _ranks(
    config: Config, worker: type, role: PolicyConfig | CriticConfig, folder: Path, frozen: bool = False
) -> list[Any]:
    """One actor for each process of a training role, not started."""
    cls = ray.remote(worker).options(num_cpus=0, num_gpus=_gpus(config, (Sharing.trainers, Sharing.all)))
    threads, timeout_s = config.cluster.threads_per_process, config.cluster.start_timeout_s

    def settings(rank: int) -> WorkerSettings:
        return WorkerSettings(rank, role.layout, role.optimizer, str(folder), config.seed, threads, timeout_s, frozen)

    return [cls.remote(settings(rank), role) for rank in range(role.layout.num_processes)]


def build_policy(config: Config, folder: Path) -> PolicyGroup:
    """The policy's ranks, not started."""
    ranks = _ranks(config, PolicyWorker, config.policy, folder)
    return PolicyGroup(ranks, config.policy, config.cluster.start_timeout_s)


def build_reference(config: Config, folder: Path) -> PolicyGroup | NoReference:
    """The starting model, frozen, in the policy's layout, not started; nothing where no KL is asked for."""
    if not config.policy.kl_coef:
        return NoReference()
    ranks = _ranks(config, PolicyWorker, config.policy, folder, frozen=True)
    return PolicyGroup(ranks, config.policy, config.cluster.start_timeout_s, "reference")


def build_estimator(config: Config, folder: Path) -> Estimator:
    """The critic's ranks, not started, or a baseline that needs none."""
    if config.advantage.baseline is not Baseline.critic:
        return EpisodeEstimator(config.advantage)
    ranks = _ranks(config, CriticWorker, config.critic, folder)
    return CriticEstimator(CriticGroup(ranks, config.critic, config.cluster.start_timeout_s), config.advantage)


def build_servers(config: Config, folder: Path, run_dir: Path) -> list[Any]:
    """Engine servers; each starts its SGLang process when it is made."""
    engine = config.rollout.engine
    cls = ray.remote(EngineServer).options(num_cpus=0, num_gpus=_gpus(config, (Sharing.all,), engine.tensor_parallel))
    return [
        cls.remote(
            engine,
            str(folder),
            config.rollout.compaction.context_tokens,
            str((run_dir / "logs" / f"engine_{number}.log").resolve()),
            cpu=config.cluster.gpus_per_node == 0,
            threads=config.cluster.threads_per_process,
            seed=config.seed + number,
            yields_memory=config.cluster.sharing is Sharing.all,
        )
        for number in range(engine.num_engines)
    ]


def build_rollout(config: Config, inputs: Prepared, engine_urls: list[str]) -> RolloutGroup:
    """Rollout workers, not started."""
    cls = ray.remote(RolloutWorker).options(num_cpus=0, max_concurrency=ASYNC_CALLS)
    rows = ray.put(inputs.train_rows), ray.put(inputs.eval_rows)
    workers = [
        cls.remote(
            RolloutSettings(
                name=f"rollout-{number}",
                config=config.rollout,
                task=inputs.task,
                model_folder=str(inputs.model_folder),
                template=config.model.template,
                vocab_size=inputs.vocab_size,
                engine_urls=engine_urls,
                seed=config.seed,
            ),
            *rows,
        )
        for number in range(config.rollout.num_workers)
    ]
    return RolloutGroup(workers, config.rollout.engine.request_timeout_s)


def build_weights(
    config: Config, policy: PolicyGroup, engines: EngineGroup, trainers: Sequence[WorkerGroup]
) -> Weights:
    """The path from the policy to the engines, not connected."""
    limit_s = config.cluster.start_timeout_s
    if config.cluster.sharing is Sharing.all:
        return SharedGpuWeights(policy, engines, limit_s, trainers)
    return Weights(policy, engines, "nccl" if config.cluster.gpus_per_node else "gloo", limit_s)


def take_turns(config: Config, trainers: Sequence[WorkerGroup]) -> None:
    """Roles that share a GPU work side by side, unless one of them leaves it for the others."""
    if config.cluster.sharing is not Sharing.none and any(one.layout.offload is Offload.role for one in trainers):
        turns = Turns()
        for one in trainers:
            one.turns = turns


def build(config: Config, inputs: Prepared, run_dir: Path) -> Parts:
    """Starts everything side by side and waits until all of it answers."""
    limit_s = config.cluster.start_timeout_s
    servers = build_servers(config, inputs.model_folder, run_dir)
    policy = build_policy(config, inputs.model_folder)
    reference = build_reference(config, inputs.model_folder)
    estimator = build_estimator(config, inputs.model_folder)
    frozen = [reference] if isinstance(reference, PolicyGroup) else []
    trainers: list[WorkerGroup] = [policy, *frozen, *estimator.roles]
    take_turns(config, trainers)
    starting = [role.start(limit_s) for role in trainers]
    buffer_class = ray.remote(BufferActor).options(num_cpus=0, max_concurrency=ASYNC_CALLS)
    buffer = buffer_class.remote(config.buffer, len(inputs.train_rows), config.seed)
    urls = ray.get([server.start.remote() for server in servers], timeout=limit_s)
    rollout = build_rollout(config, inputs, urls)
    ready = [worker.start.remote() for worker in rollout.workers]
    for pending in starting:
        pending.result(limit_s)
    ray.get(ready, timeout=limit_s)
    engines = EngineGroup(urls, inputs.vocab_size, config.rollout.compaction.context_tokens, config.rollout.engine)
    weights = build_weights(config, policy, engines, trainers)
    weights.connect()
    return Parts(
        buffer, rollout, engines, policy, reference, estimator, weights, servers, trainers, inputs.model_folder
    )
