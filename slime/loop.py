"""The loop.

    batch    whole episodes, packed for the data-parallel ranks          buffer
    ask      forward only, side by side: values, log-probabilities       critic, policy, reference
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
from dataclasses import replace

import numpy as np
import ray

from buffer.types import Batch, Float32, Scores, SubTrace, Targets
from critic.estimators import StepTargets
from slime.build import Parts
from slime.config.rows import no_turn
from slime.observe import metrics as observed
from slime.observe.watch import Watch
from slime.schema import Config
from trainer.config import KLPlace, PolicyConfig
from trainer.losses.correction import correction_weights
from trainer.losses.kl import kl_reward

VALUE_BATCHES_SEED = 7919  # keeps the critic's shuffles apart from the policy's
FETCH_TIMEOUT_S = 600.0  # for a step's episodes, which are finished
MAX_EMPTY_BATCHES = 3  # in a row, after which the run ends
EXPLAINED = "critic/explained_variance"


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
    """Waits for a step's episodes; meanwhile the view follows them.

    Episodes of which none has a turn are nothing to train on: the next ones are taken in their place. RuntimeError:
    the MAX_EMPTY_BATCHES-th such batch in a row.
    """
    for number in range(1, MAX_EMPTY_BATCHES + 1):
        waiting = parts.buffer.take.remote()
        while not ray.wait([waiting], timeout=0.5)[0]:
            parts.rollout.check()
            watch.rollout(ray.get(parts.buffer.status.remote(), timeout=60))
        batch = ray.get(waiting)
        if batch.items:
            return batch, ray.get([item.ref for item in batch.items], timeout=FETCH_TIMEOUT_S)
        reason = no_turn(config, batch.episodes)
        if number < MAX_EMPTY_BATCHES:
            watch.note(f"a step's episodes are passed over: {reason}")
            ray.get(parts.buffer.release.remote(batch.step), timeout=60)
    raise RuntimeError(f"nothing to train on, {MAX_EMPTY_BATCHES} steps in a row: {reason}")


def train_step(config: Config, parts: Parts, watch: Watch, step: int, evaluating: bool) -> dict[str, float]:
    """One pass of the loop; returns its metrics, those of an evaluation of the new weights among them."""
    clock = Clock(watch)
    rng = np.random.default_rng([config.seed, step])
    value_rng = np.random.default_rng([config.seed, step, VALUE_BATCHES_SEED])
    with clock.phase("rollout"):
        batch, sub_traces = take(config, parts, watch)
    with clock.phase("values"):
        parts.weights.lend_memory()
        asked = parts.estimator.ask(batch), parts.policy.logprobs(batch), parts.reference.logprobs(batch)
        scores = Scores(asked[0].result(), asked[1].result(), asked[2].result())
    old, reference = scores.old_logprobs, scores.reference_logprobs
    metrics = observed.rollout_metrics(batch)
    metrics |= observed.staleness_metrics(sub_traces, parts.weights.version)
    metrics |= observed.engine_metrics(sub_traces, old, parts.weights.version)
    metrics |= observed.reference_metrics(sub_traces, old, reference)
    refuse_other_weights(config, step, metrics)
    corrections = correct(config.policy, sub_traces, old)
    judged = parts.estimator.targets(batch, penalised(config.policy, sub_traces, old, reference), scores.values)
    metrics |= judged.metrics | observed.advantage_metrics(sub_traces, judged.targets)
    metrics |= observed.correction_metrics(sub_traces, corrections)
    with clock.phase("update"):
        updating = (
            parts.estimator.update(batch, judged.targets, value_rng),
            parts.policy.update(batch, sub_traces, judged.targets, scores, corrections, rng),
        )
        metrics |= {f"critic/{name}": number for name, number in updating[0].result().items()}
        metrics |= {f"policy/{name}": number for name, number in updating[1].result().items()}
    with clock.phase("publish"):
        parts.weights.publish(step)
    for role in parts.trainers:
        metrics |= role.peak_memory()
    metrics["weights/version"] = float(parts.weights.version)
    watch.sample(step, "train", batch, sub_traces, judged.targets)
    if evaluating:  # before the release: synchronous engines then serve the evaluation alone
        with clock.phase("eval"):
            metrics |= evaluate(config, parts, watch, step)
    ray.get(parts.buffer.release.remote(batch.step), timeout=60)
    return metrics | clock.metrics()


def refuse_other_weights(config: Config, step: int, metrics: Mapping[str, float]) -> None:
    """RuntimeError: engine and trainer disagree on tokens of the present weights."""
    difference = metrics["policy/engine_logprob_diff_max"]
    if difference > config.policy.max_logprob_diff:
        raise RuntimeError(
            f"step {step}: engine and trainer differ by {difference:.3g} in log-probability, "
            f"policy.max_logprob_diff is {config.policy.max_logprob_diff:g}: the engine does not run these weights"
        )


def correct(config: PolicyConfig, sub_traces: Sequence[SubTrace], old: Mapping[int, Float32]) -> list[Float32]:
    """Weight of every token's policy loss that makes up for the engine's probabilities."""
    trainers = [old[i] for i in range(len(sub_traces))]
    return correction_weights(sub_traces, trainers, config.correction, *config.correction_window)


def penalised(
    config: PolicyConfig,
    sub_traces: Sequence[SubTrace],
    old: Mapping[int, Float32],
    reference: Mapping[int, Float32],
) -> Sequence[SubTrace]:
    """Rewards less the KL to the reference, token by token, where the penalty is part of the reward.

    r_i - kl_coef k(i), k the estimator of KL(pi_old || reference) at action token i: advantages and the critic's
    returns contain the same penalty.
    """
    if not reference or config.kl_in is not KLPlace.reward:
        return sub_traces
    found = []
    for i, trace in enumerate(sub_traces):
        penalty = config.kl_coef * kl_reward(old[i], reference[i], config.kl)
        rewards = np.where(trace.action_mask, trace.rewards - penalty, 0).astype(np.float32)
        found.append(replace(trace, rewards=rewards))
    return found


def evaluate(config: Config, parts: Parts, watch: Watch, step: int) -> dict[str, float]:
    """Held-out pass rate over the episodes with a turn, sampled with the settings of training; none without any."""
    played = parts.rollout.evaluate(range(config.eval.num_tasks), config.tracking.sample_episodes)
    rewards = np.array([one.stats.reward for one in played if one.stats.num_sampled])
    watch.sample_played(step, "eval", [one for one in played if one.sub_traces])
    found = {"eval/num_tasks": float(len(rewards)), "eval/num_without_turn": float(len(played) - len(rewards))}
    if not len(rewards):
        watch.note(f"evaluation of step {step} has no pass rate: {no_turn(config, [one.stats for one in played])}")
        return found
    return found | {
        "eval/pass_rate": float(rewards.mean()),
        "eval/pass_rate_stderr": float(rewards.std() / np.sqrt(len(rewards))),
    }


def warm_up_critic(config: Config, parts: Parts, watch: Watch) -> dict[str, float]:
    """Value pre-training: returns of the unmoved policy, before the first policy update.

    Each new batch first says how well the critic explains episodes that it has not seen. If well enough, training
    stops there; else it trains on the batch, until `warmup_episodes` have been used. Then it goes over them again.
    The last batch is never trained on: what the metrics say is measured on it. The policy is still its own
    reference here, so that no KL is missing in the rewards.
    """
    size, goal = config.buffer.episodes_per_step, config.critic.warmup_explained_variance
    rng = np.random.default_rng([config.seed, VALUE_BATCHES_SEED])
    trained: list[tuple[Batch, list[Targets]]] = []
    while True:
        watch.phase(f"value pre-training: episodes {len(trained) * size}/{config.critic.warmup_episodes}")
        batch, sub_traces = take(config, parts, watch)
        judged = judge(parts, batch, sub_traces)
        ray.get(parts.buffer.release.remote(batch.step), timeout=60)
        if judged.metrics.get(EXPLAINED, 0.0) >= goal or len(trained) * size >= config.critic.warmup_episodes:
            break
        parts.estimator.update(batch, judged.targets, rng, num_epochs=1).result()
        trained.append((batch, judged.targets))
    if judged.metrics.get(EXPLAINED, 0.0) < goal:
        for epoch in range(1, config.critic.warmup_epochs):
            watch.phase(f"value pre-training: pass {epoch + 1}/{config.critic.warmup_epochs}")
            for seen, targets in trained:
                parts.estimator.update(seen, targets, rng, num_epochs=1).result()
        judged = judge(parts, batch, sub_traces)
    return {
        "critic/warmup_explained_variance": judged.metrics.get(EXPLAINED, 0.0),
        "critic/warmup_episodes": float(len(trained) * size),
        "rollout/tokens_generated": float(sum(b.num_actions for b in (*(b for b, _ in trained), batch))),
    }


def judge(parts: Parts, batch: Batch, sub_traces: Sequence[SubTrace]) -> StepTargets:
    """A batch's targets under the estimator as it is now."""
    return parts.estimator.targets(batch, sub_traces, parts.estimator.ask(batch).result())
