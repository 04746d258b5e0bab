"""A process of each kind gets stuck: the wait for it ends, the error says where, and its stacks are kept."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from tree import ROOT

import buffer.handle
from buffer.actor import BufferActor
from buffer.config import BufferConfig
from buffer.handle import BufferHandle
from machine.actors import call
from machine.failures import MAX_CHARACTERS
from machine.stacks import listen
from machine.waits import answers, keep_stacks_in, numbered
from rollout.engines.server import EngineServer
from rollout.group import RolloutGroup
from rollout.worker import Played, RolloutWorker
from trainer.config import PolicyConfig
from trainer.group import PolicyGroup
from trainer.worker import Worker

pytestmark = pytest.mark.e2e

LIMIT_S = 120.0  # generous: for the start of a process
QUIET_S = 3.0  # deadline of the waits, which nothing is to meet
HERE = Path(__file__).name


class Rank(Worker):
    """A rank whose free_cache does not return on one rank, while the other one waits for it as in a collective."""

    def __init__(self, number: int) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # no model
        self.number = number

    def ready(self) -> int:
        return os.getpid()

    def free_cache(self) -> None:
        if self.number == 2:
            return
        while self.number:
            pass
        time.sleep(10 * LIMIT_S)  # all_reduce


class Grader(RolloutWorker):
    """A rollout worker whose event loop is blocked by a reward, or whose episode waits for ever."""

    def __init__(self, blocks: bool) -> None:
        super().__init__(None, [], [])  # type: ignore[arg-type]  # no engines
        self.blocks = blocks

    async def ready(self) -> int:
        return os.getpid()

    async def evaluate(self, indices: Sequence[int], keep: int) -> list[Played]:
        self.reward() if self.blocks else await self.observe()
        return []

    def reward(self) -> None:
        time.sleep(10 * LIMIT_S)

    async def observe(self) -> None:
        await asyncio.Event().wait()


class Engine(EngineServer):
    """An engine's actor with another program in place of SGLang's."""

    def __init__(self) -> None:
        listen()
        program = "from machine.stacks import listen; import time; listen(); print(flush=True); time.sleep(600)"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def ready(self) -> int:
        return self._process.pid

    def start(self) -> str:
        self._process.wait()
        return ""


@pytest.fixture
def make(ray_cluster: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A function that makes actors, which are killed at the end, and waits until they are up."""
    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    made: list[Any] = []

    def make(cls: type, *arguments: Any, **options: Any) -> Any:
        made.append(ray_cluster.remote(cls).options(num_cpus=0, **options).remote(*arguments))
        return made[-1]

    keep_stacks_in(tmp_path)
    yield make
    keep_stacks_in(None)
    for actor in made:
        ray_cluster.kill(actor)


def ready(ray: ModuleType, *actors: Any) -> list[int]:
    """Return the ids of the actors' processes when they are up."""
    return list(ray.get([actor.ready.remote() for actor in actors], timeout=LIMIT_S))


def stopped(pid: int) -> psutil.Process:
    """Stop a process and return it when it stands still."""
    process, deadline = psutil.Process(pid), time.monotonic() + LIMIT_S
    process.send_signal(signal.SIGSTOP)
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def files(folder: Path) -> dict[str, str]:
    """Return the files of the one wait that was too long, by name."""
    (found,) = folder.iterdir()
    return {path.name: path.read_text() for path in found.iterdir()}


def test_a_rank_in_an_endless_loop_is_named_with_the_ranks_that_wait_for_it(
    ray_cluster: ModuleType, make: Callable[..., Any], tmp_path: Path
) -> None:
    ranks = [make(Rank, number) for number in range(3)]
    pids = ready(ray_cluster, *ranks)
    group = PolicyGroup(ranks, PolicyConfig(), QUIET_S)
    with pytest.raises(TimeoutError) as caught:
        group.free_cache().result()
    line = str(caught.value)
    assert line.startswith("policy.free_cache: no answer from policy rank 0, policy rank 1 in 3 s, since ")
    for rank in (0, 1):
        assert f"; policy rank {rank} (pid {pids[rank]} on " in line
    assert line.count(f" is in {HERE}:") == 2
    assert line.count(" free_cache; ") == 2
    assert f"; stacks: {tmp_path}" in line
    assert "\n" not in line
    assert len(line) < MAX_CHARACTERS
    found = files(tmp_path)
    assert sorted(found) == ["driver.txt", "overdue.txt", "policy_rank_0.txt", "policy_rank_1.txt"]
    assert "in free_cache" in found["policy_rank_1.txt"]
    assert "trainer/group.py" in found["driver.txt"]
    assert found["overdue.txt"].startswith("policy.free_cache: no answer")


def test_a_worker_whose_event_loop_is_blocked_by_a_reward_is_named(
    ray_cluster: ModuleType, make: Callable[..., Any], tmp_path: Path
) -> None:
    workers = [make(Grader, blocks, max_concurrency=8) for blocks in (True, False)]
    pids = ready(ray_cluster, *workers)
    with pytest.raises(TimeoutError) as caught:
        RolloutGroup(workers, QUIET_S).evaluate(range(2), 0)
    line = str(caught.value)
    assert line.startswith("evaluation, in which no episode made progress: no answer from rollout worker 0, rollout w")
    assert f"; rollout worker 0 (pid {pids[0]} on " in line
    assert f" is in {HERE}:" in line
    assert " reward; rollout worker 1 " in line
    assert f" has 1 task in {HERE}:" in line
    assert " observe; stacks: " in line
    assert "in reward" in files(tmp_path)["rollout_worker_0.txt"]
    assert files(tmp_path)["rollout_worker_1.txt"].startswith("1 task in ")


def test_a_stopped_data_buffer_is_named(
    ray_cluster: ModuleType, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = make(BufferActor, BufferConfig(), 8, 0, max_concurrency=64)
    handle = BufferHandle(actor)
    handle.state_dict()
    pid = ray_cluster.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=LIMIT_S)
    monkeypatch.setattr(buffer.handle, "CALL_TIMEOUT_S", QUIET_S)
    monkeypatch.setattr(buffer.handle, "WORKER_TIMEOUT_S", QUIET_S)
    process = stopped(pid)
    try:
        with pytest.raises(TimeoutError) as caught:
            handle.take(lambda counts: None)
        with pytest.raises(TimeoutError, match=r"rollout-0, a claim: no answer from the data buffer in 3 s"):
            asyncio.run(handle.claim("rollout-0"))
    finally:
        process.send_signal(signal.SIGCONT)
    line = str(caught.value)
    assert line.startswith("buffer.status: no answer from the data buffer in 3 s, since ")
    assert f"; the data buffer (pid {pid} on " in line
    assert ") is stopped (state T); stacks: " in line
    assert "no stacks: it is stopped" in files(tmp_path)["the_data_buffer.txt"]


def test_an_engine_whose_process_is_stopped_is_named(
    ray_cluster: ModuleType, make: Callable[..., Any], tmp_path: Path
) -> None:
    server = make(Engine, max_concurrency=4)
    (pid,) = ready(ray_cluster, server)
    waited = [call(server, Engine.start)]
    with pytest.raises(TimeoutError, match=rf"engine 0 \(pid \d+ on \S+\) is in {HERE}:\d+ start, its python\S* is in"):
        answers("start", numbered("engine", [server]), waited, QUIET_S)
    stopped(pid)
    with pytest.raises(TimeoutError, match=rf"has a process that is stopped \(state T\): python\S* \(pid {pid}\)"):
        answers("start", numbered("engine", [server]), waited, QUIET_S)
    assert len(list(tmp_path.iterdir())) == 2
