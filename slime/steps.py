"""A run that has been built: its first weights and evaluation, its steps and checkpoints, and when it stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slime import checkpoint, loop
from slime.observe.failures import Failures
from slime.observe.watch import Watch
from slime.run import Abandoned, Run
from slime.schema import Config


class Stop:
    """Decides after which step a run stops: its last one, or the newest when it has been told to end by a signal.

    The loop asks it once a step, and nothing else ends a run in order.
    """

    def __init__(self, num_steps: int, told_to_end: Callable[[], bool] = lambda: False) -> None:
        self._num_steps, self._told_to_end = num_steps, told_to_end

    def after(self, step: int) -> bool:
        """Return whether the run stops when `step` is done."""
        return step >= self._num_steps or self._told_to_end()


def train(config: Config, run: Run, watch: Watch, run_dir: Path, step: int, failures: Failures) -> int:
    """Do every step of a run from `step` on, with its evaluations and checkpoints; return the last one that was done.

    It is below `config.steps` when a launcher has told the run to end: then a checkpoint of it is on the disk. A step
    that is still waiting for episodes or scores is given up, another one is finished first.
    """
    run.clock.on_phase = watch.phase
    if step:
        loaded = checkpoint.load(run_dir, run)
        assert loaded == step, f"checkpoint of step {loaded}, expected {step}"
        watch.view.note(f"resumed at step {step}")
    run.weights.publish(step)
    run.weights.verify()
    run.rollout.run(run.buffer)
    if step == 0:
        first: dict[str, float] = {"weights/version": 0.0}
        if run.estimator.roles and config.critic.warmup_episodes:
            first |= loop.warm_up_critic(config, run, watch)
        watch.step(0, first | loop.evaluate(config, run, watch, 0))
    run.told_to_end = lambda: failures.supervisor.asked is not None
    stop = Stop(config.steps, run.told_to_end)
    # A failure is reported before a checkpoint that is being written is waited for.
    with (
        failures.graceful(config.checkpoint.grace_s),
        checkpoint.Checkpoints(run_dir, run, config.checkpoint.keep) as checkpoints,
        failures.at_once(),
    ):
        saved = step
        while not stop.after(step):
            try:
                _step(config, run, watch, step + 1, checkpoints)
            except Abandoned:
                break
            step += 1
            if failures.standing is not None:
                failures.standing.step = step
            if step == config.steps:  # before the checkpoint, whose presence says that the run is finished
                run.policy.export(run_dir / "model").result()
            if step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                checkpoints.save(step)
                saved = step
        if step > saved:
            checkpoints.save(step)
    return step


def _step(config: Config, run: Run, watch: Watch, step: int, checkpoints: checkpoint.Checkpoints) -> None:
    """Do one step and record it."""
    evaluating = step == config.steps or (config.eval.every > 0 and step % config.eval.every == 0)
    metrics = loop.train_step(config, run, watch, step, evaluating)
    checkpoints.check()
    watch.step(step, metrics)  # before the checkpoint: a run goes on after a checkpoint, never before metrics
