"""Replacement of rollout workers: tickets first, then a successor that plays the same buffer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from handles import Handle

from launch.deaths import Effect, ProcessDied
from slime.recovery import workers
from slime.recovery.recovery import MAX_REPLACEMENTS, Recovery
from slime.recovery.workers import WorkerReplacer


def death_of(worker: str) -> ProcessDied:
    return ProcessDied(f"{worker} was killed", None, effect=Effect.REPLACE, actor_id=worker)


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def ready() -> set[str]:
    """The workers whose start has ended."""
    return set()


@pytest.fixture
def replacer(monkeypatch: pytest.MonkeyPatch, events: list[str], ready: set[str]) -> WorkerReplacer:
    def get(ref: str) -> None:
        if ref == "w0.broken":
            raise RuntimeError("no tokenizer")

    monkeypatch.setattr(workers, "call", lambda worker, method: worker)  # the worker stands for its answer
    monkeypatch.setattr(workers.ray, "wait", lambda refs, timeout: ([one for one in refs if one in ready], []))
    monkeypatch.setattr(workers.ray, "get", get)

    def lost(name: str) -> int:
        events.append(f"reissue tickets of {name}")
        return 5

    def replace(number: int, worker: str, buffer: Any) -> None:
        events.append(f"{worker} plays as {number}")

    run: Any = SimpleNamespace(
        rollout=SimpleNamespace(workers=[Handle("w0"), Handle("w1")], replace=replace),
        buffer=SimpleNamespace(lost=lost),
        recovery=Recovery(),
    )
    started = iter(["w0.broken", *(f"w.{number}" for number in range(9))])
    return WorkerReplacer(run, lambda number: Handle(next(started)), events.append)  # type: ignore[arg-type, return-value]


def test_tickets_are_issued_again_at_once_and_the_successor_plays_when_it_is_ready(
    replacer: WorkerReplacer, events: list[str], ready: set[str]
) -> None:
    assert replacer.replaces(death_of("w0"))
    assert not replacer.replaces(death_of("engine"))
    replacer.replace(death_of("w0"))
    replacer.advance()
    assert events == [
        "reissue tickets of rollout-0",
        "w0 was killed; 5 episodes are played again, another rollout worker 0 is started",
    ]
    ready.add("w0.broken")
    replacer.advance()
    assert events[3].startswith("RuntimeError: no tokenizer")
    ready.add("w.0")
    replacer.advance()
    assert events[4:] == ["w.0 plays as 0", "rollout worker 0 plays again after 0 s"]
    replacer.advance()
    replacer.replace(death_of("w0"))  # found late
    assert len(events) == 6


def test_a_worker_that_ends_again_and_again_ends_the_run(
    replacer: WorkerReplacer, events: list[str], ready: set[str]
) -> None:
    ready |= {f"w.{number}" for number in range(9)}
    replacer.replace(death_of("w0"))
    for number in range(MAX_REPLACEMENTS - 1):
        replacer.replace(death_of(["w0.broken", "w.0"][number]))
    replacer.advance()
    with pytest.raises(RuntimeError, match="rollout worker 0 ended 4 times in a row: w0 was killed; "):
        replacer.replace(death_of("w.1"))
    replacer.replace(death_of("w1"))
    replacer.advance()
    for number in range(2, 2 + MAX_REPLACEMENTS):  # each one has worked
        replacer.joined()
        replacer.replace(death_of(f"w.{number}"))
        replacer.advance()
