"""`slime train`: from a checked config to a finished run."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import yaml

from launch.local import start_ray, stop_ray
from launch.lock import made_once, run_lock
from slime import checkpoint, loop, sft
from slime.build import Parts, build, find_places
from slime.config import ConfigError, differences, dump
from slime.observe.failures import Failures
from slime.observe.tracking import Tracker, read_metrics
from slime.observe.view import View
from slime.observe.watch import Watch
from slime.prepare import Prepared, make_task, prepare, start_folder, untrained_model
from slime.report import write_report
from slime.schema import Config, Kind, folder_of

# What may change between a run and its resume without making it another run.
_FREE = (
    *("steps", "resume", "eval.", "checkpoint.", "tracking.", "cluster.", "runs_dir", "cache_dir"),
    *("policy.layout.", "critic.layout."),  # checkpoints are read in any layout
)
_FIXED = ("policy.layout.precision", "critic.layout.precision")  # of what they hold


def open_run(config: Config) -> tuple[Path, int]:
    """The run's folder and the step to go on from. ConfigError: it is another run's, or may not be resumed."""
    run_dir = folder_of(config)
    done = checkpoint.steps(run_dir)
    saved = run_dir / "config.yaml"
    if saved.exists() and not config.resume:
        raise ConfigError(f"{run_dir} exists: choose another run= name, or resume=true to go on with it")
    if done and saved.exists():
        lines = differences(saved.read_text(), config)
        changed = [line for line in lines if line.startswith(_FIXED) or not line.startswith(_FREE)]
        if changed:
            raise ConfigError(f"{run_dir} was started with other settings: {changed[0]}; choose another run= name")
    return run_dir, done[-1] if done else 0


def record(config: Config, run_dir: Path) -> None:
    """Writes down what the run was started with: the first that it leaves, when all that can refuse was asked."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    part = run_dir / "config.part"
    part.write_text(dump(config))
    part.replace(run_dir / "config.yaml")


def start_model(config: Config, start: Config | None, failures: Failures) -> Path:
    """The model folder to start from; runs the warm start when its result is missing."""
    if start is None:
        return untrained_model(config, make_task(config))
    folder, run_dir = start_folder(config, start), folder_of(start)

    def make(part: Path) -> None:
        with run_lock(run_dir, wait=True):
            shutil.copytree(run_sft(start, run_dir, failures), part)

    made_once(folder, make)
    return folder


def run_sft(config: Config, run_dir: Path, failures: Failures) -> Path:
    """A supervised run; returns the exported model folder."""
    inputs = prepare(config)
    start_ray(config.cluster)
    places = find_places(config, run_dir, inputs.model_folder)
    record(config, run_dir)
    tracker = Tracker(run_dir, run_dir.name, yaml.safe_load(dump(config)), config.tracking, None, failures.aside)
    try:
        with View(run_dir.name, config.steps) as view, failures.at_once():
            exported = sft.run(config, inputs, run_dir, view, tracker, places)
            write_report(run_dir)
            view.final(f"warm start: {exported}")
    finally:
        tracker.close()
    return exported


def run_ppo(config: Config, run_dir: Path, step: int, inputs: Prepared, failures: Failures) -> None:
    """Builds the parts, goes on from `step`, trains to the end."""
    from transformers import AutoTokenizer  # takes seconds to import

    places = find_places(config, run_dir, inputs.model_folder)
    record(config, run_dir)
    history = read_metrics(run_dir) if step else []
    settings = yaml.safe_load(dump(config))
    tracker = Tracker(run_dir, run_dir.name, settings, config.tracking, step or None, failures.aside)
    view = View(run_dir.name, config.steps, history=[row for row in history if row["step"] <= step])
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_folder)
    t = config.tracking
    watch = Watch(view, tracker, tokenizer, inputs.train_rows, inputs.eval_rows, t.sample_every, t.sample_episodes)
    with view:
        view.phase("starting engines, workers and sandboxes")
        try:
            with failures.at_once():
                parts = build(config, inputs, run_dir, places)
            try:
                with failures.at_once():
                    train(config, parts, watch, run_dir, step, failures)
            finally:
                parts.stop(failures)
        finally:
            tracker.close()
        view.phase("report")
        report = write_report(run_dir)
        rows = [row for row in read_metrics(run_dir) if "eval/pass_rate" in row]
        held_out = "no held-out pass rate: no task had a turn"
        if rows:
            first, last = rows[0], rows[-1]
            held_out = (
                f"held-out pass rate {first['eval/pass_rate']:.2f} -> {last['eval/pass_rate']:.2f} "
                f"on {last['eval/num_tasks']:.0f} tasks"
            )
        view.final(f"{held_out}; report: {report}")


def train(config: Config, parts: Parts, watch: Watch, run_dir: Path, step: int, failures: Failures) -> None:
    """Every step of a run, with its evaluations and checkpoints."""
    if step:
        loaded = checkpoint.load(run_dir, parts)
        assert loaded == step, f"checkpoint of step {loaded}, expected {step}"
        watch.view.note(f"resumed at step {step}")
    parts.weights.publish(step)
    parts.weights.verify()
    parts.rollout.run(parts.buffer)
    if step == 0:
        first: dict[str, float] = {"weights/version": 0.0}
        if parts.estimator.roles and config.critic.warmup_episodes:
            first |= loop.warm_up_critic(config, parts, watch)
        watch.phase("eval")
        watch.step(0, first | loop.evaluate(config, parts, watch, 0))
    # What fails is told before a checkpoint that is being written is waited for.
    with checkpoint.Checkpoints(run_dir, parts, config.checkpoint.keep) as checkpoints, failures.at_once():
        while step < config.steps:
            step += 1
            last = step == config.steps
            evaluating = last or (config.eval.every > 0 and step % config.eval.every == 0)
            metrics = loop.train_step(config, parts, watch, step, evaluating)
            checkpoints.check()
            watch.step(step, metrics)  # before the checkpoint: a run goes on after a checkpoint, never before metrics
            if last:  # before the checkpoint, whose presence says that the run is finished
                parts.policy.submit("export", str((run_dir / "model").resolve())).result()
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                checkpoints.save(step)


def main(config: Config, start: Config | None, failures: Failures) -> None:
    """Runs a recipe to its end, or goes on with one that was stopped. `start`: the recipe that makes its model."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with run_lock(folder_of(config)):
        _main(config, start, failures)


def _main(config: Config, start: Config | None, failures: Failures) -> None:
    run_dir, step = open_run(config)
    try:
        with failures.at_once():
            if config.kind is Kind.sft:
                run_sft(config, run_dir, failures)
                return
            if step >= config.steps:
                print(f"{run_dir} has finished its {config.steps} steps; report: {write_report(run_dir)}")
                return
            inputs = prepare(config, start)  # what is wrong is said before the warm start, not after it
            inputs = replace(inputs, model_folder=start_model(config, start, failures))
            start_ray(config.cluster)
            run_ppo(config, run_dir, step, inputs, failures)
    finally:
        with failures.aside("stopping Ray"):
            failures.supervisor.stop_looking()
            stop_ray()
