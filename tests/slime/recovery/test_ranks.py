"""Restart of the training roles: which errors call for it, what is replaced, and how often."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from handles import Handle
from ray.exceptions import RayActorError

from launch import deaths
from launch.deaths import Effect, ProcessDied
from slime.observe.failures import Failures
from slime.recovery import ranks
from slime.recovery.ranks import MAX_RESTARTS, Builder, Restarts
from slime.recovery.recovery import RanksLost, Recovery


def death_of(actor: str) -> ProcessDied:
    return ProcessDied(f"{actor} was killed", None, effect=Effect.RESTART, actor_id=actor)


def roles(*names: str) -> Any:
    groups = [SimpleNamespace(actors=[Handle(name)]) for name in names]
    return SimpleNamespace(policy=groups[0], groups=groups)


def unused(number: int) -> Any:
    raise AssertionError("no engine and no rollout worker died")


class Job:
    """A run with two roles, and the notes of what a restart does with it."""

    def __init__(self, failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.newest = 3
        monkeypatch.setattr("slime.checkpoint.steps", lambda run_dir: [1, self.newest])
        monkeypatch.setattr(ranks.ray, "kill", lambda actor: self.events.append(f"kill {actor}"))
        weights = SimpleNamespace(use_policy=lambda policy, groups: self.events.append(f"connect {policy.actors[0]}"))
        buffer = SimpleNamespace(actor=Handle("buffer"))
        self.run: Any = SimpleNamespace(
            models=roles("policy", "critic"), buffer=buffer, weights=weights, recovery=Recovery()
        )
        another: Any = SimpleNamespace(actor=Handle("buffer again"))
        again = roles("policy again", "critic again")
        builder = Builder(unused, unused, roles=lambda: again, buffer=lambda: another)
        self.restarts = Restarts(self.run, builder, failures.supervisor, Path(), self.events.append)  # type: ignore[arg-type]


@pytest.fixture
def failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("slime.observe.failures.SETTLE_S", 0.05)
    monkeypatch.setattr("slime.observe.failures.SETTLE_LOST_S", 0.05)
    monkeypatch.setattr(deaths.DeathWatch, "look", lambda self: None)
    with Failures(tmp_path) as found:
        yield found


def test_all_training_processes_are_replaced_and_the_weights_group_is_made_anew(
    failures: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(failures, monkeypatch)
    failures.supervisor.deaths += [death_of("policy"), death_of("engine")]  # the first one follows from the critic's
    assert job.restarts.restart(death_of("critic")) == 3
    assert job.events[0] == ("critic was killed; all training processes start again and repeat the steps after step 3")
    assert job.events[1:4] == ["kill policy", "kill critic", "connect policy again"]
    assert [group.actors for group in job.run.models.groups] == [["policy again"], ["critic again"]]
    assert job.run.buffer.actor == "buffer"
    assert [one.actor_id for one in failures.supervisor.deaths] == ["engine"]
    assert job.run.recovery.metrics()["recovery/restarts"] == 1


@pytest.mark.parametrize("seen_later", [False, True])
def test_a_dead_buffer_is_replaced_too(failures: Failures, monkeypatch: pytest.MonkeyPatch, seen_later: bool) -> None:
    job = Job(failures, monkeypatch)
    if seen_later:
        failures.supervisor.deaths.append(death_of("buffer"))
    job.restarts.restart(death_of("critic" if seen_later else "buffer"))
    assert job.run.buffer.actor == "buffer again"
    assert not failures.supervisor.deaths


def test_restarts_without_a_new_checkpoint_are_limited(failures: Failures, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(failures, monkeypatch)
    for newest in (3, 4):
        job.newest = newest
        for _ in range(MAX_RESTARTS):
            job.restarts.restart(death_of("critic"))
    with pytest.raises(RuntimeError, match=r"died 4 times since the checkpoint of step 4: critic was killed; critic"):
        job.restarts.restart(death_of("critic"))


def test_an_error_that_follows_from_a_death_calls_for_a_restart(failures: Failures) -> None:
    failures.supervisor.deaths.append(death_of("critic"))
    with pytest.raises(RanksLost, match="critic was killed"), failures.ranks_lost():
        raise RayActorError
    assert failures.recovers(RayActorError())
    with pytest.raises(RanksLost, match="policy was killed"), failures.ranks_lost():
        raise RanksLost(death_of("policy"))


def test_any_other_error_stays_what_it_is(failures: Failures) -> None:
    failures.supervisor.deaths.append(ProcessDied("engine 0 was killed", None, effect=Effect.REPLACE))
    with pytest.raises(RuntimeError, match="nothing to train on"), failures.ranks_lost():
        raise RuntimeError("nothing to train on")
    assert not failures.recovers(RuntimeError("nothing to train on"))
    with pytest.raises(KeyboardInterrupt), failures.ranks_lost():
        raise KeyboardInterrupt
