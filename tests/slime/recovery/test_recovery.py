"""The queue of deaths and what the loop makes of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path

import pytest

from launch.deaths import DeathWatch, Effect, ProcessDied
from slime.observe.failures import Failures
from slime.recovery.recovery import RanksLost, Recovery

LIMIT_S = 60.0
ENGINE = ProcessDied("engine 0 was killed", None, effect=Effect.REPLACE, actor_id="e0")
RANK = ProcessDied("critic rank 1 was killed", None, effect=Effect.RESTART, actor_id="c1")


class Engines:
    """Replaces engines, and notes when it is asked to."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def replaces(self, death: ProcessDied) -> bool:
        return death.actor_id.startswith("e")

    def replace(self, death: ProcessDied) -> None:
        self.seen.append(death.actor_id)

    def advance(self) -> None:
        self.seen.append("advanced")

    joining = False

    def joined(self) -> None:
        self.seen.append("joined")


def test_each_death_is_handled_once_and_ready_successors_join_at_every_check() -> None:
    engines, deaths = Engines(), deque([ENGINE])
    recovery = Recovery(deaths, [engines])
    recovery.check()
    recovery.check()
    assert engines.seen == ["e0", "advanced", "advanced"]
    assert not deaths


def test_a_dead_rank_calls_for_a_restart_of_the_training_roles() -> None:
    deaths = deque([RANK])
    with pytest.raises(RanksLost, match="critic rank 1 was killed") as lost:
        Recovery(deaths, [Engines()]).check()
    assert lost.value.death is RANK
    assert not deaths


def test_a_death_that_nothing_handles_ends_the_run_and_stays_the_reason() -> None:
    deaths = deque([ENGINE])
    with pytest.raises(RuntimeError, match="nothing replaces it: engine 0 was killed"):
        Recovery(deaths).check()
    assert list(deaths) == [ENGINE]


def found(monkeypatch: pytest.MonkeyPatch, *seen: ProcessDied) -> threading.Event:
    """Let the supervisor find these deaths, one a look, after the returned event is set."""
    left, begun = list(seen), threading.Event()
    monkeypatch.setattr(DeathWatch, "look", lambda self: left.pop(0) if begun.is_set() and left else None)
    return begun


def wait_for(deaths: deque[ProcessDied], count: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while len(deaths) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_deaths_wait_in_the_queue_while_the_run_can_recover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = found(monkeypatch, ENGINE, RANK)
    with Failures(tmp_path) as failures, failures.supervisor.recoverable():
        begun.set()
        wait_for(failures.supervisor.deaths, 2)
    assert failures.exit_code == 0
    assert list(failures.supervisor.deaths) == [ENGINE, RANK]


def test_a_death_that_was_not_handled_is_told_in_place_of_its_consequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = found(monkeypatch, ENGINE)
    with Failures(tmp_path) as failures, failures.at_once(), failures.supervisor.recoverable():
        begun.set()
        wait_for(failures.supervisor.deaths, 1)
        raise RuntimeError("Connection closed by peer")
    assert failures.exit_code == 1
    assert capsys.readouterr().err == "slime: error: engine 0 was killed\n"


def test_the_death_of_any_other_process_ends_a_run_that_can_recover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = found(monkeypatch, ENGINE, ProcessDied("Ray's raylet was killed", None))
    with Failures(tmp_path) as failures, failures.at_once(), failures.supervisor.recoverable():
        begun.set()
        threading.Event().wait(LIMIT_S)
    assert failures.exit_code == 1
    assert capsys.readouterr().err == "slime: error: Ray's raylet was killed\n"
