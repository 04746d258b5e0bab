"""The time limit of one request or one start does not limit longer operations that make progress."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError
from roles import batch_of, sub_trace

import rollout.group
import trainer.group
from buffer.types import Targets
from critic.config import CriticConfig
from critic.group import CriticGroup
from rollout.config import EngineConfig
from rollout.engines.group import EngineGroup
from rollout.group import RolloutGroup
from slime.build import build_rollout, list_engines
from slime.config import load
from slime.start.placement import placement
from trainer.config import LayoutConfig

QUIET_S = 3.0


def _done(value: Any) -> Future[Any]:
    found: Future[Any] = Future()
    found.set_result(value)
    return found


def _wait(refs: list[Future[Any]], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
    done = concurrent.futures.wait(refs, timeout=0).done
    return [ref for ref in refs if ref in done], [ref for ref in refs if ref not in done]


def _get(refs: Any, timeout: float | None = None) -> Any:
    return [ref.result(timeout=0) for ref in refs] if isinstance(refs, list) else refs.result(timeout=0)


FAKE_RAY = SimpleNamespace(wait=_wait, get=_get, put=lambda value: value)


class Worker:
    """Plays one evaluation, which ends at poll `length` and makes progress until poll `active`."""

    def __init__(self, length: int, active: int) -> None:
        self.polls, self.answer = itertools.count(1), Future[Any]()
        self.evaluate = SimpleNamespace(remote=lambda share, keep: self.answer)
        self.progress = SimpleNamespace(remote=self._progress)
        self.length, self.active = length, active

    def _progress(self) -> Future[Any]:
        poll = next(self.polls)
        if poll == self.length:
            self.answer.set_result([f"{id(self)}"])
        return _done(min(poll, self.active))


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read of the clock advances it by one second."""
    clock = SimpleNamespace(monotonic=map(float, itertools.count()).__next__, sleep=lambda seconds: None)
    for module in (rollout.group, trainer.group):
        monkeypatch.setattr(module, "ray", FAKE_RAY)
        monkeypatch.setattr(module, "time", clock, raising=False)


def test_an_evaluation_is_as_long_as_something_happens_in_it() -> None:
    workers: list[Any] = [Worker(length=50, active=50), Worker(length=10, active=10)]
    assert len(RolloutGroup(workers, QUIET_S).evaluate(range(8), keep=0)) == 2


def test_an_evaluation_in_which_nothing_happens_names_its_workers() -> None:
    workers: list[Any] = [Worker(length=3, active=5), Worker(length=1000, active=5)]
    with pytest.raises(
        TimeoutError,
        match=r"evaluation, in which no episode made progress: no answer from rollout worker 1 in 3 s, since \d",
    ):
        RolloutGroup(workers, QUIET_S).evaluate(range(8), keep=0)


def test_the_share_of_a_worker_that_dies_is_played_by_its_successor() -> None:
    workers: list[Any] = [Worker(length=5, active=50), Worker(length=1000, active=50)]
    workers[1].answer.set_exception(RayActorError())
    workers[1].progress = SimpleNamespace(remote=lambda: workers[1].answer)
    group, polls = RolloutGroup(list(workers), QUIET_S), itertools.count()

    def waiting() -> None:
        if next(polls) == 2:
            group.workers[1] = Worker(length=5, active=50)  # type: ignore[call-overload]

    assert len(group.evaluate(range(8), keep=0, waiting=waiting)) == 2
    assert next(polls) > 3


def test_a_worker_that_dies_and_is_not_replaced_is_waited_for_no_longer_than_others() -> None:
    workers: list[Any] = [Worker(length=3, active=5), Worker(length=1000, active=5)]
    workers[1].answer.set_exception(RayActorError())
    with pytest.raises(TimeoutError, match=r"evaluation, in which no .* no answer from rollout worker 1 in 3 s"):
        RolloutGroup(workers, QUIET_S).evaluate(range(8), keep=0)


def test_a_worker_that_dies_is_told_while_the_others_play_on() -> None:
    workers: list[Any] = [Worker(length=1000, active=1000), Worker(length=1000, active=1000)]
    workers[1].answer.set_exception(RuntimeError("the worker died"))
    with pytest.raises(RuntimeError, match="the worker died"):
        RolloutGroup(workers, QUIET_S).evaluate(range(8), keep=0)


@pytest.mark.parametrize(("request_s", "quiet_s"), [(5.0, 3600.0), (7200.0, 7200.0)])
def test_requests_do_not_limit_episodes(monkeypatch: pytest.MonkeyPatch, request_s: float, quiet_s: float) -> None:
    config = load(["recipe=ppo_coding", f"rollout.engine.request_timeout_s={request_s}"]).config
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: "worker"))
    monkeypatch.setattr("ray.remote", lambda cls: made)
    monkeypatch.setattr("ray.put", lambda rows: rows)
    monkeypatch.setattr("slime.build.watch", lambda name, worker, effect: worker)
    inputs: Any = SimpleNamespace(train_rows=[], eval_rows=[], task=None, model_folder=SimpleNamespace(resolve=str))
    inputs.vocab_size = 10
    assert build_rollout(config, inputs, list_engines(config, inputs, []), placement(config)).quiet_s == quiet_s


def test_what_moves_a_model_is_not_limited_like_a_turn() -> None:
    async def limits() -> list[float]:
        group = EngineGroup(("http://127.0.0.1:1",), 10, 10, EngineConfig(start_timeout_s=900.0, request_timeout_s=5.0))
        async with group.clients() as clients:
            return [client.request_timeout_s for client in clients]

    assert asyncio.run(limits()) == [900.0]


def test_a_role_has_its_limit_for_every_micro_batch() -> None:
    rng = np.random.default_rng(0)
    batch = batch_of([sub_trace(rng, 30, episode) for episode in range(6)])
    rank: Any = SimpleNamespace(values=SimpleNamespace(remote=lambda refs, grid: Future()))
    config = CriticConfig(LayoutConfig(max_tokens_per_micro_batch=32), num_minibatches=2, num_epochs=2)
    group = CriticGroup([rank], config, timeout_s=10.0)
    asked = group.values(batch)
    with pytest.raises(TimeoutError, match=r"critic\.values: no answer from critic rank 0 in 60 s, since \d"):
        asked.result()
    rank.update = SimpleNamespace(remote=lambda refs, columns, grids: Future())
    targets = [Targets(*(np.zeros(30, np.float32) for _ in range(3))) for _ in range(6)]
    with pytest.raises(TimeoutError, match="in 120 s"):
        group.update(batch, targets, rng).result()
