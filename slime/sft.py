"""Supervised warm start on the task's demonstrations, with the same agent loop and Megatron workers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ray

from buffer.types import Batch, EpisodeStats, SubTraceInfo
from launch.deaths import forget
from rollout.group import RolloutGroup
from rollout.worker import Played
from slime.build import build_policy, build_rollout, list_engines
from slime.config.rows import no_turn
from slime.observe.tracking import Tracker
from slime.observe.view import View
from slime.schema import Config
from slime.start.placement import Placement
from slime.start.prepare import Prepared

EPISODES_PER_CALL = 32
MAX_WITHOUT_TURN = 1024  # demonstrations from the first on, after which the run ends


class Drawn(NamedTuple):
    """The demonstrations of one optimizer step."""

    items: list[SubTraceInfo]  # each with an action
    without_turn: list[EpisodeStats]  # of the demonstrations without a turn that were played for it


def demonstrations(config: Config, inputs: Prepared, rollout: RolloutGroup) -> Iterator[Drawn]:
    """Yield endless shuffled batches of sub-traces that hold an action; one call ahead of their use.

    RuntimeError: no row has a demonstration with a turn, or the first MAX_WITHOUT_TURN that were drawn have none.
    """
    rng = random.Random(config.seed)
    pool: list[SubTraceInfo] = []
    order: list[int] = []
    num_batches = 0
    found_some = False

    def ask() -> list[ray.ObjectRef[list[Played]]]:
        while len(order) < EPISODES_PER_CALL:
            order[:0] = rng.sample(range(len(inputs.train_rows)), len(inputs.train_rows))  # behind those that are left
        indices = [order.pop() for _ in range(EPISODES_PER_CALL)]
        return rollout.demonstrate(indices, min(1.0, num_batches / config.steps))

    coming = ask()
    while True:
        without_turn: list[EpisodeStats] = []
        while len(pool) < 4 * config.sft.batch_sub_traces:
            ready, coming = rollout.played(coming, "demonstrations"), ask()
            for played in ready:
                if not played.sub_traces:
                    without_turn.append(played.stats)
                pool += [
                    SubTraceInfo(s, s.episode_id, len(s.tokens), s.num_actions, 0)
                    for s in played.sub_traces
                    if s.num_actions
                ]
            found_some = found_some or bool(pool)
            if not found_some and len(without_turn) >= min(MAX_WITHOUT_TURN, len(inputs.train_rows)):
                raise RuntimeError(f"no demonstration to learn: {no_turn(config, without_turn)}")
        rng.shuffle(pool)
        chosen, pool = pool[: config.sft.batch_sub_traces], pool[config.sft.batch_sub_traces :]
        num_batches += 1
        yield Drawn(chosen, without_turn)


def run(config: Config, inputs: Prepared, run_dir: Path, view: View, tracker: Tracker, where: Placement) -> Path:
    """Train `config.steps` optimizer steps and export a Hugging Face folder; return it."""
    limit_s = config.cluster.start_timeout_s
    view.phase("starting training processes and sandboxes")
    policy = build_policy(config, inputs.model_folder, where)
    starting = policy.start(limit_s)
    rollout = build_rollout(config, inputs, list_engines(config, inputs, []), where)
    rollout.started(rollout.start(), limit_s)
    starting.result(limit_s)
    view.phase("imitating demonstrations")
    batches = demonstrations(config, inputs, rollout)
    told = False
    for step in range(1, config.steps + 1):
        began = time.perf_counter()
        items, without_turn = next(batches)
        batch = Batch(step, tuple(items), ())
        if without_turn and not told:
            told = True
            view.note(f"demonstrations are left out: {no_turn(config, without_turn)}")
        waited = time.perf_counter()
        grid = policy.grid(range(len(batch.items)), [item.num_tokens for item in batch.items])
        found = policy.imitate(batch, grid).result()
        done = time.perf_counter()
        metrics = {f"policy/{name}": number for name, number in found.items()} | policy.peak_memory()
        metrics |= {
            "sft/tokens": float(batch.num_tokens),
            "sft/num_without_turn": float(len(without_turn)),
            "time/rollout_s": waited - began,
            "time/update_s": done - waited,
            "time/step_s": done - began,
            "time/other_s": 0.0,
        }
        tracker.log(step, metrics)
        view.step({"step": step, "time_s": tracker.elapsed_s, **metrics})
    folder = (run_dir / "model").resolve()
    policy.export(folder).result()
    forget([*policy.actors, *rollout.workers])
    rollout.stop()
    for actor in (*policy.actors, *rollout.workers):
        ray.kill(actor)
    return folder
