"""Settings that a run never reads because of its other settings. They are refused on the command line, not ignored.

Values in the files of recipes, models and clusters are not checked: a file is combined with many others, so it may set
values that a particular run does not read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields

from critic.config import Baseline
from slime.config.checks import get
from slime.config.nodes import trained_roles
from slime.schema import Config, Kind, Resume
from trainer.config import Correction, PolicyConfig

Idle = tuple[Sequence[str], str]  # keys or sections; why they are not read, and the cure

_TRAINED = {"layout", "megatron", "optimizer", "engine"}  # the policy's settings that a warm start reads
_NOT_IN_SFT = (
    *("rollout.engine", "rollout.episodes_in_flight", "buffer", "advantage", "critic", "model.start"),
    *(f"policy.{field.name}" for field in fields(PolicyConfig) if field.name not in _TRAINED),
    *("eval", "checkpoint", "tracking.sample_episodes", "tracking.sample_every", "resume_allow"),
)
_OF_A_CRITIC = ("critic", *(f"advantage.lambda_{name}" for name in ("policy", "critic", "alpha", "length")))


def without_effect(config: Config, given: Collection[str]) -> Iterator[str]:
    """Yield, for each key of `given` without effect in this run, the reason and the cure."""
    for keys, reason in _idle(config):
        for key in given:
            if any(key == one or key.startswith(f"{one}.") for one in keys):
                value = get(config, key)
                value = getattr(value, "value", str(value).lower() if isinstance(value, bool) else value)
                yield f"{key}={value} has no effect {reason}"


def _idle(config: Config) -> Iterator[Idle]:
    for group in ("model", "cluster"):
        yield [f"{group}.name"], f"but in names and tables: choose the {group}'s file with {group}=NAME"
    yield from _in_sft(config) if config.kind is Kind.sft else _in_ppo(config)
    yield from _on_cpus(config)
    for role, _ in trained_roles(config):
        if not getattr(config, role).optimizer.decay_steps:
            key = f"{role}.optimizer"
            yield [f"{key}.final_lr_ratio"], f"with {key}.decay_steps=0, a constant rate: use decay_steps above 0"
    if not config.tracking.wandb:
        yield ["tracking.project"], "with tracking.wandb=false: leave it out, or use tracking.wandb=true"
    if not config.rollout.compaction.max_compactions:
        yield (
            ["rollout.compaction.keep_steps", "policy.train_summaries"],
            "with rollout.compaction.max_compactions=0: use max_compactions above 0",
        )


def _in_sft(config: Config) -> Iterator[Idle]:
    yield _NOT_IN_SFT, "in a recipe of kind sft, which imitates demonstrations of model.path: leave it out"


def _in_ppo(config: Config) -> Iterator[Idle]:
    if not config.model.start:
        yield ["sft"], "without a warm start: use model.start=RECIPE, or leave it out"
    baseline, policy = config.advantage.baseline, config.policy
    if baseline is not Baseline.critic:
        yield (
            _OF_A_CRITIC,
            f"with advantage.baseline={baseline.value}, which has no critic: leave it out, or use baseline=critic",
        )
    if config.advantage.lambda_alpha:
        yield (
            ["advantage.lambda_policy"],
            f"with advantage.lambda_alpha={config.advantage.lambda_alpha:g}, which makes lambda of the length: "
            "leave it out, or use lambda_alpha=0",
        )
    else:
        yield ["advantage.lambda_length"], "with advantage.lambda_alpha=0: use lambda_alpha above 0, e.g. 1.5"
    if not config.critic.warmup_episodes:
        yield (
            ["critic.warmup_epochs", "critic.warmup_explained_variance"],
            f"with critic.warmup_episodes=0: use e.g. warmup_episodes={5 * config.buffer.episodes_per_step}",
        )
    if not policy.kl_coef:
        yield ["policy.kl", "policy.kl_in"], "with policy.kl_coef=0: use e.g. kl_coef=1e-3"
    if policy.correction is Correction.none:
        yield ["policy.correction_bounds"], "with policy.correction=none: use correction=tis, icepop or mis"
    if config.resume is Resume.never:
        yield ["resume_allow"], "with resume=never: leave it out, or use resume=auto"
    if not config.tracking.sample_episodes:
        yield ["tracking.sample_every"], "with tracking.sample_episodes=0: use sample_episodes above 0"


def _on_cpus(config: Config) -> Iterator[Idle]:
    if config.cluster.gpus_per_node:
        return
    on_cpus = "on CPUs (cluster.gpus_per_node=0)"
    yield ["rollout.engine.memory_fraction"], f"{on_cpus}: use rollout.engine.max_total_tokens"
    yield [f"{role}.layout.offload" for role, _ in trained_roles(config)], f"{on_cpus}: leave it out"
