"""Stack dumps: of an endless loop, of a deadlock, of a stopped process, and of a process that does not listen."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tree import ROOT

from machine.failures import Frame
from machine.stacks import Seen, innermost, look, own_stacks, tasks

LIMIT_S = 60.0
LOOP = "def grade():\n    print('ready', flush=True)\n    while True:\n        pass\n"
DEADLOCK = """
import threading
def grade():
    lock = threading.Lock()
    lock.acquire()
    print('ready', flush=True)
    lock.acquire()
"""


@contextmanager
def running(folder: Path, source: str, before: str = "from machine.stacks import listen\nlisten()\n") -> Iterator[int]:
    """Yield the id of a process that has called `grade` of this source."""
    path = folder / "my_task.py"
    path.write_text(f"{source}\n{before}\ngrade()\n")
    command, environment = [sys.executable, str(path)], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(("source", "line"), [(LOOP, "[34]"), (DEADLOCK, "7")])
def test_a_stuck_process_shows_the_line_that_it_is_stuck_in(source: str, line: str, tmp_path: Path) -> None:
    with running(tmp_path, source) as pid:
        seen, again = look(pid, LIMIT_S), look(pid, LIMIT_S)
        assert psutil.pid_exists(pid)
    for one in (seen, again):
        assert one.stacks.count("most recent call first") == 1  # each dump is of its own
        assert one.where.startswith("is in my_task.py:")
        assert one.where.endswith(" grade")
    assert f"process {pid} (" in seen.text


def test_a_stopped_process_is_said_to_be_stopped_and_so_is_its_parent(tmp_path: Path) -> None:
    child = "import subprocess, sys\ndef grade():\n    one = subprocess.Popen(['sleep', '600'])\n"
    child += "    print('ready', flush=True)\n    one.wait()\n"
    with running(tmp_path, child) as pid:
        (sleeper,) = psutil.Process(pid).children()
        try:
            assert look(pid, LIMIT_S).children == ()  # it has no stacks, and nothing is wrong with it
            sleeper.send_signal(signal.SIGSTOP)
            _wait_for(sleeper, psutil.STATUS_STOPPED)
            where = f"has a process that is stopped (state T): sleep (pid {sleeper.pid})"
            assert look(pid, LIMIT_S).where == where
            os.kill(pid, signal.SIGSTOP)
            _wait_for(psutil.Process(pid), psutil.STATUS_STOPPED)
            assert look(pid, LIMIT_S).where == "is stopped (state T)"
        finally:
            sleeper.kill()


def test_a_process_that_does_not_listen_is_not_harmed(tmp_path: Path) -> None:
    """The signal would kill it. The file in memory is inherited by no program that the process starts."""
    with running(tmp_path, LOOP, before="") as pid:
        seen = look(pid)
        assert "does not listen" in seen.stacks
        time.sleep(0.1)
        assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_process_that_has_ended_is_told() -> None:
    process = subprocess.Popen(["true"])
    process.wait(LIMIT_S)
    assert look(process.pid).where == "has ended"


def test_py_spy_is_used_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "py-spy"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert look(1).stacks == "dump --nonblocking --pid 1\n"


def test_the_frame_that_describes_a_process_is_of_its_oldest_thread_outside_of_libraries() -> None:
    helper = f'Thread 0x1 (most recent call first):\n  File "{ROOT}/slime/view.py", line 1 in draw'
    main = (
        'Current thread 0x2 (most recent call first):\n  File "/usr/lib/python3.11/threading.py", line 5 in wait\n'
        f'  File "{ROOT}/trainer/engine.py", line 163 in forward\n  File "{ROOT}/trainer/worker.py", line 9 in update'
    )
    assert innermost(f"{helper}\n\n{main}\n") == Frame(f"{ROOT}/trainer/engine.py", 163, "forward")
    assert str(innermost(main)) == "trainer/engine.py:163 forward"
    library = (
        'Thread 0x1 (most recent call first):\n  File "/v/lib/python3.11/site-packages/sglang/srt/a.py", line 2 in f'
    )
    assert str(innermost(f"{library}\n")) == "sglang/srt/a.py:2 f"
    assert str(innermost(f"{helper}\n\n{library}\n")) == "slime/view.py:1 draw"
    assert innermost("no stacks: gone") is None


def test_an_actor_without_a_call_waits_for_one() -> None:
    loop = 'Thread 0x1 (most recent call first):\n  File "/v/site-packages/ray/_private/worker.py", line 9 in main_loop'
    assert Seen(1, "ray::PolicyWorker", stacks=loop).where == "waits for a call"


def test_own_stacks_have_every_thread() -> None:
    assert "test_own_stacks_have_every_thread" in own_stacks()


def test_tasks_are_counted_by_the_place_where_they_wait() -> None:
    async def wait() -> None:
        await asyncio.sleep(LIMIT_S)

    async def count() -> str:
        waiting = [asyncio.create_task(wait()) for _ in range(3)]
        await asyncio.sleep(0)
        found = tasks()
        for task in waiting:
            task.cancel()
        return found

    line = wait.__code__.co_firstlineno + 1
    assert asyncio.run(count()).startswith(f"3 tasks in {Path(__file__).name}:{line} wait")
    assert "wait" not in tasks()


def _wait_for(process: psutil.Process, state: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while process.status() != state:
        assert time.monotonic() < deadline
        time.sleep(0.01)
