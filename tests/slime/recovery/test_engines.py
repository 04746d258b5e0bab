"""Replacement of engines: when one is out of use, when its successor joins, and how often."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from handles import Handle

from launch.deaths import Effect, ProcessDied
from slime.recovery import engines
from slime.recovery.engines import EngineReplacer
from slime.recovery.recovery import MAX_REPLACEMENTS, Recovery


class Job:
    """A run with two engines whose starts end when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.up: dict[Any, str | Exception] = {}  # server that has started -> its URL, or its error
        self.num_started = 0
        note = self.events.append
        monkeypatch.setattr(engines, "call", lambda server, method: server)  # the server stands for its answer
        monkeypatch.setattr(engines.ray, "wait", lambda refs, timeout: ([one for one in refs if one in self.up], []))
        monkeypatch.setattr(engines.ray, "get", self.answer)
        monkeypatch.setattr(engines.ray, "kill", lambda server: note(f"kill {server}"))
        self.run: Any = SimpleNamespace(
            engines=SimpleNamespace(urls=("u0", "u1")),
            servers=[Handle("s0"), Handle("s1")],
            rollout=SimpleNamespace(set_engines=lambda urls: note(f"workers {urls}")),
            weights=SimpleNamespace(use_engines=lambda urls: note(f"weights {urls}")),
            recovery=Recovery(),
        )
        self.replacer = EngineReplacer(self.run, self.start, note)  # type: ignore[arg-type]

    def start(self, number: int) -> Any:
        self.num_started += 1
        return Handle(f"s{number}.{self.num_started}")

    def answer(self, ref: Any) -> str:
        found = self.up[ref]
        if isinstance(found, Exception):
            raise found
        return found

    def told(self) -> list[str]:
        """Return the events since the last call."""
        found, self.events[:] = list(self.events), []
        return found


def death_of(server: str) -> ProcessDied:
    return ProcessDied(f"{server} was killed", None, effect=Effect.REPLACE, actor_id=server)


def test_an_engine_is_out_of_use_at_once_and_its_successor_joins_at_a_publication(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(monkeypatch)
    replacer = job.replacer
    assert replacer.replaces(death_of("s1"))
    assert not replacer.replaces(death_of("policy"))
    replacer.replace(death_of("s1"))
    first = ["s1 was killed; another engine 1 is started", "workers ['u0']", "weights ['u0']", "kill s1"]
    assert job.told() == first
    replacer.advance()
    replacer.joined()  # a publication to the other engine
    assert job.told() == ["workers ['u0']"]
    assert not replacer.joining
    job.up["s1.1"] = "u2"
    replacer.advance()
    assert job.told() == ["weights ['u0', 'u2']"]  # no episode before it has the policy's weights
    assert replacer.joining
    replacer.joined()
    assert job.told() == ["workers ['u0', 'u2']", "engine 1 serves again after 0 s"]
    assert not replacer.joining
    assert job.run.recovery.metrics()["recovery/engines"] == 1
    replacer.advance()
    replacer.replace(death_of("s1"))  # found late
    assert job.told() == []


def test_an_engine_that_ends_again_and_again_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch)
    for _ in range(2):
        for _ in range(MAX_REPLACEMENTS):
            job.replacer.replace(death_of(job.run.servers[0]))
        job.up[job.run.servers[0]] = "again"
        job.replacer.advance()
        job.replacer.joined()  # it has worked
    job.replacer.replace(death_of("s1"))
    for _ in range(MAX_REPLACEMENTS - 1):
        job.up[job.run.servers[1]] = RuntimeError("engine 1 ended while it started")
        job.replacer.advance()
    job.up[job.run.servers[1]] = TimeoutError("engine 1 is not up after 600 s")
    with pytest.raises(RuntimeError, match=r"engine 1 ended 4 times in a row: s1 was killed; .* is not up after 600 s"):
        job.replacer.advance()
