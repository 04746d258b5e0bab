"""A run that has been built: its first weights and evaluation, its steps and checkpoints, and when it stops."""

from __future__ import annotations

from pathlib import Path

from slime import checkpoint, loop
from slime.observe.failures import Failures
from slime.observe.watch import Watch
from slime.run import Run
from slime.schema import Config


class Stop:
    """Decides after which step a run stops. The loop asks it once a step, and nothing else ends a run in order."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def after(self, step: int) -> bool:
        """Return whether the run stops when `step` is done."""
        return step >= self._num_steps


def train(config: Config, run: Run, watch: Watch, run_dir: Path, step: int, failures: Failures) -> None:
    """Do every step of a run from `step` on, with its evaluations and checkpoints."""
    run.clock.on_phase = watch.phase
    if step:
        loaded = checkpoint.load(run_dir, run)
        assert loaded == step, f"checkpoint of step {loaded}, expected {step}"
        watch.view.note(f"resumed at step {step}")
    run.weights.publish(step)
    run.weights.verify()
    run.rollout.run(run.buffer.actor)
    if step == 0:
        first: dict[str, float] = {"weights/version": 0.0}
        if run.estimator.roles and config.critic.warmup_episodes:
            first |= loop.warm_up_critic(config, run, watch)
        watch.step(0, first | loop.evaluate(config, run, watch, 0))
    stop = Stop(config.steps)
    # A failure is reported before a checkpoint that is being written is waited for.
    with checkpoint.Checkpoints(run_dir, run, config.checkpoint.keep) as checkpoints, failures.at_once():
        last = stop.after(step)
        while not last:
            step += 1
            last = stop.after(step)
            evaluating = last or (config.eval.every > 0 and step % config.eval.every == 0)
            metrics = loop.train_step(config, run, watch, step, evaluating)
            checkpoints.check()
            watch.step(step, metrics)  # before the checkpoint: a run goes on after a checkpoint, never before metrics
            if last:  # before the checkpoint, whose presence says that the run is finished
                run.policy.export(run_dir / "model").result()
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                checkpoints.save(step)
