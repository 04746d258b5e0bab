"""The hook of a pod that is told to end: real processes hold the run's folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.kubernetes import stop as hook
from launch.kubernetes.stop import stop
from launch.lock import Holder, run_lock

LIMIT_S = 60.0
RUN = """
    import signal, sys, time
    from pathlib import Path
    from launch.lock import run_lock

    folder, told = Path(sys.argv[1]), []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    with run_lock(folder):
        print("holds it", flush=True)
        while not told:
            time.sleep(0.05)
        (folder / "saved").touch()
    sys.exit(75)
"""


@contextmanager
def a_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the folder and takes SIGTERM as a run does."""
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds it\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_run_of_this_pod_saves_its_state_before_the_hook_ends(tmp_path: Path) -> None:
    with a_run(tmp_path) as run:
        done = subprocess.run(
            [sys.executable, "-m", "launch.kubernetes.stop", str(tmp_path), str(LIMIT_S)], check=False, timeout=LIMIT_S
        )
        assert done.returncode == 0
        assert (tmp_path / "saved").exists()
        assert run.wait(LIMIT_S) == 75


def test_the_hook_of_another_pod_waits_for_the_end_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "another-pod")
    with a_run(tmp_path) as run:
        waiting = threading.Thread(target=stop, args=(tmp_path, LIMIT_S))
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        assert run.poll() is None  # not this pod's to signal
        run.terminate()
        waiting.join(LIMIT_S)
        assert not waiting.is_alive()
        assert (tmp_path / "saved").exists()


def test_nothing_is_waited_for_where_no_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    stop(tmp_path, LIMIT_S)
    stop(tmp_path / "absent", LIMIT_S)
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps(asdict(replace(Holder.here(), pid=dead.pid))))
    stop(tmp_path, LIMIT_S)  # it was killed
    monkeypatch.setattr(hook, "SILENT_S", 0.1)
    lock.write_text(json.dumps(asdict(replace(Holder.here(), host="a-pod-that-is-gone"))))
    stop(tmp_path, LIMIT_S)
    assert time.monotonic() < begin + LIMIT_S


def test_a_run_that_does_not_end_is_not_waited_for_longer_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    with run_lock(tmp_path):
        stop(tmp_path, 1.2)
    assert sent == [(os.getpid(), 15)]  # once
