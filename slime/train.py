"""`slime train`: from a checked config to a finished run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from launch.local import start_ray, stop_ray
from launch.lock import made_once, run_lock
from slime import sft
from slime.build import build, rebuilder
from slime.config import dump
from slime.observe.failures import Failures
from slime.observe.standing import Standing, State
from slime.observe.tracking import Tracker, read_metrics
from slime.observe.view import View
from slime.observe.watch import Watch
from slime.report import write_report
from slime.schema import Config, Kind, folder_of
from slime.start.folder import open_run, record, refuse_other_rows, resume_notes
from slime.start.manifest import Manifest
from slime.start.placement import place_run
from slime.start.prepare import Prepared, make_task, prepare, start_folder, untrained_model
from slime.steps import train


def start_model(config: Config, start: Config | None, failures: Failures, warnings: Sequence[str] = ()) -> Path:
    """Return the model folder to start from; run the warm start when its result is missing."""
    if start is None:
        return untrained_model(config, make_task(config))
    folder, run_dir = start_folder(config, start), folder_of(start)

    def make(part: Path) -> None:
        with run_lock(run_dir, wait=True):
            shutil.copytree(run_sft(start, run_dir, failures, warnings), part)

    made_once(folder, make)
    return folder


def run_sft(config: Config, run_dir: Path, failures: Failures, warnings: Sequence[str] = ()) -> Path:
    """Run supervised training and return the exported model folder."""
    inputs = prepare(config)
    start_ray(config.cluster)
    where = place_run(config, run_dir, inputs.model_folder)
    record(config, run_dir, None, [*warnings, *where.warnings])
    tracker = Tracker(run_dir, run_dir.name, yaml.safe_load(dump(config)), config.tracking, None, failures.aside)
    try:
        with View(run_dir.name, config.steps) as view, failures.at_once():
            exported = sft.run(config, inputs, run_dir, view, tracker, where)
            write_report(run_dir)
            view.final(f"warm start: {exported}")
    finally:
        tracker.close()
    return exported


def run_ppo(
    config: Config, newest: Manifest | None, inputs: Prepared, failures: Failures, warnings: Sequence[str]
) -> None:
    """Build the run and train from the newest checkpoint to the end. `warnings`: of the pre-flight checks."""
    from transformers import AutoTokenizer  # takes seconds to import

    run_dir, step = folder_of(config), newest.step if newest else 0
    where = place_run(config, run_dir, inputs.model_folder)
    record(config, run_dir, newest, [*warnings, *where.warnings])
    failures.note(State.running)
    history = read_metrics(run_dir) if step else []
    settings = yaml.safe_load(dump(config))
    tracker = Tracker(run_dir, run_dir.name, settings, config.tracking, step or None, failures.aside)
    view = View(run_dir.name, config.steps, history=[row for row in history if row["step"] <= step])
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_folder)
    t = config.tracking
    watch = Watch(view, tracker, tokenizer, inputs.train_rows, inputs.eval_rows, t.sample_every, t.sample_episodes)
    with view:
        for note in resume_notes(config, newest):
            view.note(f"resumed with a change: {note}")
        view.phase("starting engines, workers and sandboxes")
        try:
            with failures.at_once():
                run = build(config, inputs, run_dir, where)
            try:
                with failures.at_once():
                    builder = rebuilder(config, inputs, run_dir, where, run)
                    done = train(config, run, watch, run_dir, step, failures, builder)
                    if done < config.steps:
                        failures.to_be_continued()
            finally:
                run.stop(failures)
        finally:
            tracker.close()
        if done < config.steps:
            return
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
        failures.note(State.finished)


def main(config: Config, start: Config | None, failures: Failures, warnings: Sequence[str] = ()) -> None:
    """Run a recipe to its end, or resume it.

    `start`: the recipe that makes its model. `warnings`: of the pre-flight checks, for the logs.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with run_lock(folder_of(config)):
        _main(config, start, failures, warnings)


def _main(config: Config, start: Config | None, failures: Failures, warnings: Sequence[str]) -> None:
    run_dir, newest = open_run(config)
    step = newest.step if newest else 0
    failures.standing = Standing(run_dir, step, config.steps)
    try:
        with failures.at_once():
            if config.kind is Kind.sft:
                run_sft(config, run_dir, failures, warnings)
                failures.note(State.finished)
                return
            if step >= config.steps:
                print(f"{run_dir} has finished its {config.steps} steps; report: {write_report(run_dir)}")
                return
            inputs = prepare(config, start)  # errors are reported before the warm start, not after it
            refuse_other_rows(config, newest, inputs.rows_digest)
            inputs = replace(inputs, model_folder=start_model(config, start, failures, warnings))
            start_ray(config.cluster)
            run_ppo(config, newest, inputs, failures, warnings)
    finally:
        with failures.aside("stopping Ray"):
            failures.supervisor.stop_looking()
            stop_ray()
