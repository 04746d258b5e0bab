"""The training loop. `train_step` is one training step.

    take      whole episodes, packed for the data-parallel ranks          buffer
    score     forward passes in parallel: values, log-probabilities       critic, policy, reference
    targets   advantages and returns, once, where episodes are whole      here
    update    critic and policy in parallel                               critic, policy
    publish   new weights, device to device, into the running engines     policy -> engines
    release   frees slots, so that prompts can be claimed again           buffer

Synchronous training is this loop with slots = episodes_per_step; with more slots the engines continue
while it trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from buffer.store import Counts
from buffer.types import Batch, Float32, Scores, SubTrace, Targets
from critic.estimators import StepTargets
from machine.waits import objects
from slime.config.rows import no_turn
from slime.observe import metrics as observed
from slime.observe.watch import Watch
from slime.run import Run
from slime.schema import Config
from trainer.config import KLPlace, PolicyConfig
from trainer.losses.correction import correction_weights
from trainer.losses.kl import kl_reward

VALUE_BATCHES_SEED = 7919  # makes the critic's shuffles differ from the policy's
FETCH_TIMEOUT_S = 600.0  # for the finished episodes of a step
MAX_EMPTY_BATCHES = 3  # consecutive empty batches after which the run fails
EXPLAINED = "critic/explained_variance"


@dataclass(frozen=True)
class StepRecord:
    """The inputs and results of one step, for its metrics and samples."""

    step: int
    version: int  # of the weights that the step started from
    batch: Batch
    sub_traces: Sequence[SubTrace]
    scores: Scores
    agreement: Mapping[str, float]  # of engine and trainer
    corrections: Sequence[Float32]
    targets: StepTargets
    updates: Mapping[str, float]


def train_step(config: Config, run: Run, watch: Watch, step: int, evaluating: bool) -> dict[str, float]:
    """Train on one batch, publish the new weights and return the metrics, including those of an evaluation."""
    run.clock.restart()
    version = run.weights.version
    batch, sub_traces = take(config, run, watch)
    scores = run.score(batch)
    run.abandon_if_told()
    agreement = refuse_other_weights(config, step, sub_traces, scores, version)
    corrections = correct(config.policy, sub_traces, scores)
    targets = run.estimator.targets(batch, penalized(config.policy, sub_traces, scores), scores.values)
    updates = run.update(batch, sub_traces, targets.targets, scores, corrections, generators(config, step))
    run.publish(step)
    done = StepRecord(step, version, batch, sub_traces, scores, agreement, corrections, targets, updates)
    metrics = observe(done, run, watch)
    if evaluating:  # before the release, so that synchronous engines serve only the evaluation
        metrics |= evaluate(config, run, watch, step)
    run.buffer.release(batch.step)
    return metrics | run.clock.metrics()


def take(config: Config, run: Run, watch: Watch, phase: str = "rollout") -> tuple[Batch, list[SubTrace]]:
    """Wait for a step's episodes and return them. The view shows their progress meanwhile.

    A batch in which no episode has a turn is skipped. RuntimeError: MAX_EMPTY_BATCHES such batches in a row.
    """

    def waiting(counts: Counts) -> None:
        run.check()
        run.abandon_if_told()
        watch.rollout(counts)

    with run.clock.phase(phase):
        for number in range(1, MAX_EMPTY_BATCHES + 1):
            batch = run.buffer.take(waiting)
            if batch.items:
                return batch, objects("a step's episodes", [item.ref for item in batch.items], FETCH_TIMEOUT_S)
            reason = no_turn(config, batch.episodes)
            if number < MAX_EMPTY_BATCHES:
                watch.note(f"a step's episodes are passed over: {reason}")
                run.buffer.release(batch.step)
        raise RuntimeError(f"nothing to train on, {MAX_EMPTY_BATCHES} steps in a row: {reason}")


def generators(config: Config, step: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Return the generators of a step's minibatches, for the policy and for the critic."""
    seed = [config.seed, step]
    return np.random.default_rng(seed), np.random.default_rng([*seed, VALUE_BATCHES_SEED])


def refuse_other_weights(
    config: Config, step: int, sub_traces: Sequence[SubTrace], scores: Scores, version: int
) -> dict[str, float]:
    """Compare the log-probabilities of engine and trainer and return the metrics of `engine_metrics`.

    RuntimeError: for tokens of the current weights, `version`, they differ by more than policy.max_logprob_diff.
    """
    agreement = observed.engine_metrics(sub_traces, scores.old_logprobs, version)
    difference = agreement["policy/engine_logprob_diff_max"]
    if difference > config.policy.max_logprob_diff:
        raise RuntimeError(
            f"step {step}: engine and trainer differ by {difference:.3g} in log-probability, "
            f"policy.max_logprob_diff is {config.policy.max_logprob_diff:g}: the engine does not run these weights"
        )
    return agreement


def correct(config: PolicyConfig, sub_traces: Sequence[SubTrace], scores: Scores) -> list[Float32]:
    """Return a weight for every token's policy loss that corrects for the engine's probabilities."""
    trainers = [scores.old_logprobs[i] for i in range(len(sub_traces))]
    return correction_weights(sub_traces, trainers, config.correction, *config.correction_window)


def penalized(config: PolicyConfig, sub_traces: Sequence[SubTrace], scores: Scores) -> Sequence[SubTrace]:
    """Return the sub-traces with the KL penalty subtracted from the reward of every action token, with kl_in=reward.

    The reward becomes r_i - kl_coef k(i), where k(i) estimates KL(pi_old || reference) at action token i. Advantages
    and the critic's returns contain the same penalty.
    """
    old, reference = scores.old_logprobs, scores.reference_logprobs
    if not reference or config.kl_in is not KLPlace.reward:
        return sub_traces
    found = []
    for i, trace in enumerate(sub_traces):
        penalty = config.kl_coef * kl_reward(old[i], reference[i], config.kl)
        rewards = np.where(trace.action_mask, trace.rewards - penalty, 0).astype(np.float32)
        found.append(replace(trace, rewards=rewards))
    return found


def observe(done: StepRecord, run: Run, watch: Watch) -> dict[str, float]:
    """Return the metrics of a step and save some of its episodes as samples."""
    sub_traces, scores, targets = done.sub_traces, done.scores, done.targets
    watch.sample(done.step, "train", done.batch, sub_traces, targets.targets)
    return {
        **observed.rollout_metrics(done.batch),
        **observed.staleness_metrics(sub_traces, done.version),
        **done.agreement,
        **observed.reference_metrics(sub_traces, scores.old_logprobs, scores.reference_logprobs),
        **targets.metrics,
        **observed.advantage_metrics(sub_traces, targets.targets),
        **observed.correction_metrics(sub_traces, done.corrections),
        **done.updates,
        **run.peak_memory(),
        **run.recovery.metrics(),
        "weights/version": float(run.weights.version),
    }


def evaluate(config: Config, run: Run, watch: Watch, step: int) -> dict[str, float]:
    """Return the held-out pass rate over the episodes with a turn, sampled as in training. Omit it if none has one."""
    with run.clock.phase("eval"):
        played = run.rollout.evaluate(range(config.eval.num_tasks), config.tracking.sample_episodes, run.check)
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


def warm_up_critic(config: Config, run: Run, watch: Watch) -> dict[str, float]:
    """Pre-train the critic on returns of the initial policy, before the first policy update.

    Each new batch first measures the critic's explained variance on unseen episodes. Training stops if it reaches
    the goal; otherwise the critic trains on the batch, until `warmup_episodes` have been used. Then it trains on them
    again for the remaining epochs. The last batch is never trained on: the metrics are measured on it. The policy
    still equals its reference here, so the KL penalty in the rewards would be zero.
    """
    size, goal = config.buffer.episodes_per_step, config.critic.warmup_explained_variance
    rng = np.random.default_rng([config.seed, VALUE_BATCHES_SEED])
    trained: list[tuple[Batch, list[Targets]]] = []
    while True:
        phase = f"value pre-training: episodes {len(trained) * size}/{config.critic.warmup_episodes}"
        batch, sub_traces = take(config, run, watch, phase)
        judged = judge(run, batch, sub_traces)
        run.buffer.release(batch.step)
        if judged.metrics.get(EXPLAINED, 0.0) >= goal or len(trained) * size >= config.critic.warmup_episodes:
            break
        run.estimator.update(batch, judged.targets, rng, num_epochs=1).result()
        trained.append((batch, judged.targets))
    if judged.metrics.get(EXPLAINED, 0.0) < goal:
        for epoch in range(1, config.critic.warmup_epochs):
            watch.phase(f"value pre-training: pass {epoch + 1}/{config.critic.warmup_epochs}")
            for seen, targets in trained:
                run.estimator.update(seen, targets, rng, num_epochs=1).result()
        judged = judge(run, batch, sub_traces)
    return {
        "critic/warmup_explained_variance": judged.metrics.get(EXPLAINED, 0.0),
        "critic/warmup_episodes": float(len(trained) * size),
        "rollout/tokens_generated": float(sum(b.num_actions for b in (*(b for b, _ in trained), batch))),
    }


def judge(run: Run, batch: Batch, sub_traces: Sequence[SubTrace]) -> StepTargets:
    """Return a batch's targets under the current estimator."""
    return run.estimator.targets(batch, sub_traces, run.estimator.ask(batch).result())
