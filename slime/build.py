"""Which objects a run is made of. Here, and only here, is chosen what the loop then calls by one name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from buffer.actor import BufferActor
from critic.config import CriticConfig
from critic.group import CriticGroup
from critic.worker import CriticWorker
from rollout.engine import EngineServer
from rollout.group import EngineGroup, RolloutGroup
from rollout.worker import RolloutSettings, RolloutWorker
from slime.prepare import Prepared
from slime.schema import Config
from slime.weights import Weights
from trainer.config import PolicyConfig
from trainer.group import PolicyGroup
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
    critic: CriticGroup
    weights: Weights
    servers: list[Any]

    def stop(self) -> None:
        """Ends engines and sandboxes; Ray's own end takes the rest."""
        self.rollout.stop()
        ray.get([server.stop.remote() for server in self.servers], timeout=60)


def _gpus(config: Config, each: int = 1) -> int:
    return each if config.cluster.gpus_per_node else 0


def _ranks(config: Config, worker: type, role: PolicyConfig | CriticConfig, folder: Path) -> list[Any]:
    """One actor for each process of a training role, not started."""
    cls = ray.remote(worker).options(num_cpus=0, num_gpus=_gpus(config))
    threads, timeout_s = config.cluster.threads_per_process, config.cluster.start_timeout_s

    def settings(rank: int) -> WorkerSettings:
        return WorkerSettings(rank, role.layout, role.optimizer, str(folder), config.seed, threads, timeout_s)

    return [cls.remote(settings(rank), role) for rank in range(role.layout.num_processes)]


def build_policy(config: Config, folder: Path) -> PolicyGroup:
    """The policy's ranks, not started."""
    ranks = _ranks(config, PolicyWorker, config.policy, folder)
    return PolicyGroup(ranks, config.policy, config.cluster.start_timeout_s)


def build_critic(config: Config, folder: Path) -> CriticGroup:
    """The critic's ranks, not started."""
    ranks = _ranks(config, CriticWorker, config.critic, folder)
    return CriticGroup(ranks, config.critic, config.cluster.start_timeout_s)


def build_servers(config: Config, folder: Path, run_dir: Path) -> list[Any]:
    """Engine servers; each starts its SGLang process when it is made."""
    engine = config.rollout.engine
    cls = ray.remote(EngineServer).options(num_cpus=0, num_gpus=_gpus(config, engine.tensor_parallel))
    return [
        cls.remote(
            engine,
            str(folder),
            config.rollout.compaction.context_tokens,
            str((run_dir / "logs" / f"engine_{number}.log").resolve()),
            cpu=config.cluster.gpus_per_node == 0,
            threads=config.cluster.threads_per_process,
            seed=config.seed + number,
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


def build(config: Config, inputs: Prepared, run_dir: Path) -> Parts:
    """Starts everything side by side and waits until all of it answers."""
    limit_s = config.cluster.start_timeout_s
    servers = build_servers(config, inputs.model_folder, run_dir)
    policy = build_policy(config, inputs.model_folder)
    critic = build_critic(config, inputs.model_folder)
    starting = [policy.start(limit_s), critic.start(limit_s)]
    buffer_class = ray.remote(BufferActor).options(num_cpus=0, max_concurrency=ASYNC_CALLS)
    buffer = buffer_class.remote(config.buffer, len(inputs.train_rows), config.seed)
    urls = ray.get([server.start.remote() for server in servers], timeout=limit_s)
    rollout = build_rollout(config, inputs, urls)
    ready = [worker.start.remote() for worker in rollout.workers]
    for pending in starting:
        pending.result(limit_s)
    ray.get(ready, timeout=limit_s)
    engines = EngineGroup(urls, inputs.vocab_size, config.rollout.compaction.context_tokens, config.rollout.engine)
    weights = Weights(policy, engines, config.cluster.gpus_per_node > 0, limit_s)
    weights.connect()
    return Parts(buffer, rollout, engines, policy, critic, weights, servers)
