"""The loop.

    batch    whole episodes, packed for the data-parallel ranks          buffer
    values   forward only, beside the policy's own log-probabilities     critic, policy
    targets  advantages and returns, once, where episodes are whole      here
    update   critic and policy side by side                              critic, policy
    publish  new weights, device to device, into the running engines     policy -> engines
    release  frees slots: prompts may be claimed again                   buffer

Synchronous training is this loop with slots = episodes_per_step; with more slots the engines go on
while it trains.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import ray

from buffer.types import Batch, Float32, SubTrace
from critic.advantages import advantages
from critic.diagnostics import explained_variance
from slime.build import Parts
from slime.observe.watch import Watch
from slime.schema import Config

VALUE_BATCHES_SEED = 7919  # keeps the critic's shuffles apart from the policy's


class Clock:
    """Seconds of a step, by phase."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._began = time.perf_counter()
        self.spent_s: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of its block to phase `name`."""
        self._watch.phase(name)
        began = time.perf_counter()
        yield
        self.spent_s[name] = self.spent_s.get(name, 0.0) + time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        total = time.perf_counter() - self._began
        found = {f"time/{name}_s": seconds for name, seconds in self.spent_s.items()}
        return found | {"time/step_s": total, "time/other_s": total - sum(self.spent_s.values())}


def take(config: Config, parts: Parts, watch: Watch) -> tuple[Batch, list[SubTrace]]:
    """Waits for a step's episodes; meanwhile the view follows them."""
    waiting = parts.buffer.take.remote()
    while not ray.wait([waiting], timeout=0.5)[0]:
        parts.rollout.check()
        watch.rollout(ray.get(parts.buffer.status.remote(), timeout=60))
    batch = ray.get(waiting)
    return batch, ray.get([item.ref for item in batch.items], timeout=config.cluster.start_timeout_s)


def logprob_difference(sub_traces: Sequence[SubTrace], logprobs: Mapping[int, Float32], version: int) -> float:
    """Largest difference of engine and trainer log-probabilities, over tokens sampled at `version`; 0 if none were."""
    worst = 0.0
    for i, trace in enumerate(sub_traces):
        mask = trace.action_mask & (trace.versions == version)
        if mask.any():
            worst = max(worst, float(np.abs(trace.logprobs[mask] - logprobs[i][mask]).max()))
    return worst


def train_step(config: Config, parts: Parts, watch: Watch, step: int, evaluating: bool) -> dict[str, float]:
    """One pass of the loop; returns its metrics, those of an evaluation of the new weights among them."""
    clock = Clock(watch)
    rng = np.random.default_rng([config.seed, step])
    value_rng = np.random.default_rng([config.seed, step, VALUE_BATCHES_SEED])
    with clock.phase("rollout"):
        batch, sub_traces = take(config, parts, watch)
    with clock.phase("values"):
        pending = parts.critic.values(batch), parts.policy.logprobs(batch)
        values, logprobs = pending[0].result(), pending[1].result()
    targets = advantages(sub_traces, [values[i] for i in range(len(sub_traces))], config.advantage)
    difference = logprob_difference(sub_traces, logprobs, parts.weights.version)
    if difference > config.policy.max_logprob_diff:
        raise RuntimeError(
            f"step {step}: engine and trainer differ by {difference:.3g} in log-probability, "
            f"policy.max_logprob_diff is {config.policy.max_logprob_diff:g}: the engine does not run these weights"
        )
    with clock.phase("update"):
        updating = (
            parts.critic.update(batch, targets, value_rng),
            parts.policy.update(batch, sub_traces, targets, logprobs, rng),
        )
        critic_metrics, policy_metrics = updating[0].result(), updating[1].result()
    lag = parts.weights.version - min((item.oldest_version for item in batch.items), default=parts.weights.version)
    with clock.phase("publish"):
        parts.weights.publish(step)
    watch.sample(step, "train", batch, sub_traces, targets)
    metrics = rollout_metrics(batch)
    metrics |= {f"policy/{name}": number for name, number in policy_metrics.items() if name != "clipped"}
    metrics |= {f"critic/{name}": number for name, number in critic_metrics.items()}
    masks = [trace.action_mask for trace in sub_traces]
    flat = {
        name: np.concatenate([getattr(t, name)[m] for t, m in zip(targets, masks, strict=True)])
        for name in ("values", "returns", "advantages")
    }
    metrics |= {
        "policy/clip_fraction": policy_metrics["clipped"],
        "policy/engine_logprob_diff_max": difference,
        "policy/advantage_std": float(flat["advantages"].std()),
        "critic/explained_variance": explained_variance(flat["values"], flat["returns"]),
        "critic/value_mean": float(flat["values"].mean()),
        "weights/version": float(parts.weights.version),
        "weights/lag_max": float(lag),
    }
    if evaluating:  # before the release: synchronous engines then serve the evaluation alone
        with clock.phase("eval"):
            metrics |= evaluate(config, parts, watch, step)
    ray.get(parts.buffer.release.remote(batch.step), timeout=60)
    return metrics | clock.metrics()


def rollout_metrics(batch: Batch) -> dict[str, float]:
    """Numbers of a batch's episodes."""

    def mean(name: str) -> float:
        return float(np.mean([stats[name] for stats in batch.episodes]))

    return {
        "rollout/reward_mean": mean("reward"),
        "rollout/num_episodes": float(len(batch.episodes)),
        "rollout/num_sub_traces": float(len(batch.items)),
        "rollout/compactions_per_episode": mean("compactions"),
        "rollout/compacted_fraction": mean("compacted"),
        "rollout/turns_per_episode": mean("turns"),
        "rollout/truncated_fraction": mean("truncated"),
        "rollout/tokens_generated": float(sum(stats["tokens_generated"] for stats in batch.episodes)),
        "rollout/tokens_trained": float(batch.num_tokens),
        "rollout/engine_time_fraction": mean("engine_seconds") / mean("seconds"),
    }


def evaluate(config: Config, parts: Parts, watch: Watch, step: int) -> dict[str, float]:
    """Held-out pass rate, sampled with the settings of training."""
    played = parts.rollout.evaluate(range(config.eval.num_tasks), config.tracking.sample_episodes)
    rewards = np.array([one.stats["reward"] for one in played])
    watch.sample_played(step, "eval", [one for one in played if one.sub_traces])
    return {
        "eval/pass_rate": float(rewards.mean()),
        "eval/pass_rate_stderr": float(rewards.std() / np.sqrt(len(rewards))),
        "eval/num_tasks": float(len(rewards)),
    }


def warm_up_critic(config: Config, parts: Parts, watch: Watch) -> dict[str, float]:
    """Value pre-training: returns of the unmoved policy, before the first policy update.

    The last batch is held out; its explained variance is what the metrics say.
    """
    size = config.buffer.episodes_per_step
    batches = []
    for done in range(0, config.critic.warmup_episodes, size):
        watch.phase(f"value pre-training: episodes {done}/{config.critic.warmup_episodes}")
        batch, sub_traces = take(config, parts, watch)
        values = parts.critic.values(batch).result()
        targets = advantages(sub_traces, [values[i] for i in range(len(sub_traces))], config.advantage)
        batches.append((batch, sub_traces, targets))
        ray.get(parts.buffer.release.remote(batch.step), timeout=60)
    rng = np.random.default_rng([config.seed, VALUE_BATCHES_SEED])
    for epoch in range(config.critic.warmup_epochs):
        watch.phase(f"value pre-training: pass {epoch + 1}/{config.critic.warmup_epochs}")
        for batch, _, targets in batches[:-1] or batches:
            parts.critic.update(batch, targets, rng, num_epochs=1).result()
    batch, sub_traces, targets = batches[-1]
    values = parts.critic.values(batch).result()
    found = np.concatenate([values[i][trace.action_mask] for i, trace in enumerate(sub_traces)])
    wanted = np.concatenate([t.returns[trace.action_mask] for t, trace in zip(targets, sub_traces, strict=True)])
    return {"critic/warmup_explained_variance": explained_variance(found, wanted)}
