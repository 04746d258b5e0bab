"""Execution of a built run: initial weights and evaluation, steps, checkpoints and the stop condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.deaths import ProcessDied
from slime import checkpoint, loop
from slime.observe.failures import Failures
from slime.observe.standing import State
from slime.observe.watch import Watch
from slime.recovery.engines import EngineReplacer
from slime.recovery.ranks import Builder, Restarts
from slime.recovery.recovery import RanksLost, Recovery
from slime.recovery.workers import WorkerReplacer
from slime.run import Abandoned, Run
from slime.schema import Config


class Stop:
    """The stop condition of a run: its last step is done, or a signal told it to end.

    The loop checks it once per step, and nothing else ends a run normally.
    """

    def __init__(self, num_steps: int, told_to_end: Callable[[], bool] = lambda: False) -> None:
        self._num_steps, self._told_to_end = num_steps, told_to_end

    def after(self, step: int) -> bool:
        """Return whether the run stops after `step`."""
        return step >= self._num_steps or self._told_to_end()


def train(
    config: Config, run: Run, watch: Watch, run_dir: Path, step: int, failures: Failures, builder: Builder
) -> int:
    """Run all steps after `step`, with their evaluations and checkpoints, and return the last completed step.

    The result is below `config.steps` if a launcher told the run to end; a checkpoint of that step is then on disk.
    A step that still waits for episodes or scores is abandoned; a step that is further along is completed first.
    If a training process dies, all of them start again (slime/recovery/ranks.py) from the newest checkpoint.
    """
    run.clock.on_phase = watch.phase
    first = run.buffer.state_dict()
    replacers = EngineReplacer(run, builder.engine, watch.note), WorkerReplacer(run, builder.worker, watch.note)
    run.recovery = Recovery(failures.supervisor.deaths, replacers)
    restarts = Restarts(run, builder, failures.supervisor, run_dir, watch.note)
    death: ProcessDied | None = None
    with failures.supervisor.recoverable():
        while True:
            try:
                with failures.ranks_lost():
                    if death is not None:
                        watch.phase("restarting the training processes")
                        step = restarts.restart(death)
                        watch.rewind(step or -1)
                    begin(run, watch, run_dir, step, first)
                    return _attempt(config, run, watch, run_dir, step, failures)
            except RanksLost as lost:
                death = lost.death


def begin(run: Run, watch: Watch, run_dir: Path, step: int, first: Mapping[str, Any]) -> None:
    """Restore the checkpoint of `step`, publish its weights and let the rollout workers play.

    `first`: the buffer's state at the beginning of the run, used without a checkpoint.
    """
    taken = checkpoint.load(run_dir, run)
    loaded = taken.step if taken is not None else 0
    assert loaded == step, f"checkpoint of step {loaded}, expected {step}"
    if taken is not None:
        watch.note(f"resumed at step {step}")
    run.send_weights(step)
    run.weights.verify()
    run.buffer.load_state_dict(dict(taken.buffer if taken is not None else first))
    run.play()


def _attempt(config: Config, run: Run, watch: Watch, run_dir: Path, step: int, failures: Failures) -> int:
    """Run the steps after `step` and return the last completed one. RanksLost: a training process died."""
    if step == 0:
        found: dict[str, float] = {"weights/version": 0.0}
        if run.estimator.roles and config.critic.warmup_episodes:
            found |= loop.warm_up_critic(config, run, watch)
        watch.step(0, found | loop.evaluate(config, run, watch, 0))
    run.told_to_end = lambda: failures.supervisor.asked is not None
    stop = Stop(config.steps, run.told_to_end)

    def tell(refused: str) -> None:
        if refused:
            watch.note(refused)
        failures.note(State.running, refused)

    # Report a failure before waiting for a checkpoint that is being written.
    with (
        failures.graceful(config.checkpoint.grace_s),
        checkpoint.Checkpoints(run_dir, run, config.checkpoint.keep, tell) as checkpoints,
        failures.at_once(unless=failures.recovers),
    ):
        while not stop.after(step):
            try:
                _step(config, run, watch, step + 1, checkpoints)
            except Abandoned:
                break
            step += 1
            if failures.standing is not None:
                failures.standing.step = step
            if step == config.steps:  # before the checkpoint, which marks the run as finished
                run.policy.export(run_dir / "model").result()
            if step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                checkpoints.save(step)
        checkpoints.finish(step)
    return step


def _step(config: Config, run: Run, watch: Watch, step: int, checkpoints: checkpoint.Checkpoints) -> None:
    """Run one step and record its metrics."""
    evaluating = step == config.steps or (config.eval.every > 0 and step % config.eval.every == 0)
    metrics = loop.train_step(config, run, watch, step, evaluating)
    checkpoints.check()
    watch.step(step, metrics)  # before the checkpoint, so that a resumed run has the metrics of all earlier steps
