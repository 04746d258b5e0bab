"""One writer per folder: refusals, waits, and the lock of a dead holder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch import lock
from launch.lock import FolderLock, Holder, LockError, made_once, run_lock

HOLD = """
import sys, time
from pathlib import Path
from launch.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a run's folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with holder(folder) as first:
        with pytest.raises(LockError) as refusal, run_lock(folder):
            pass
        told = str(refusal.value)
        assert f"{folder} is in use by process {first.pid} on {socket.gethostname()} (started 2" in told
        assert "choose another run= name" in told
        assert "\n" not in told
        first.communicate("", timeout=30)
    assert not folder.parent.exists()  # neither holder nor refused one left anything
    with run_lock(folder):
        pass


def test_a_holder_that_is_killed_blocks_nobody(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=30)
    assert (tmp_path / "run.lock").exists()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_stays(tmp_path: Path) -> None:
    with run_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_one_process_does_not_hold_a_folder_twice(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(LockError, match=f"process {os.getpid()} on"), run_lock(tmp_path):
        pass


def test_a_folder_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "file" / "run"
    folder.parent.touch()
    with pytest.raises(LockError, match=r"file/run can't be written to: Not a directory"), run_lock(folder):
        pass


def test_a_current_folder_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(LockError, match="can't be written to: No such file or directory"), run_lock(Path("runs/one")):
        pass


# Over a shared disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Holder:
    """The record of a holder on another machine, whose flock does not reach this one."""
    found = Holder("node-7", 4321, "2026-01-31 12:00:00", "another kernel")
    (tmp_path / "run.lock").write_text(json.dumps(asdict(found)))
    return found


def test_a_holder_on_another_machine_is_refused_while_it_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: Holder
) -> None:
    monkeypatch.setattr(lock, "SILENT_S", 60.0)
    monkeypatch.setattr(lock, "POLL_S", 0.05)
    beat = json.dumps(asdict(replace(elsewhere, beats=1)))
    threading.Timer(0.2, (tmp_path / "run.lock").write_text, [beat]).start()
    with pytest.raises(LockError, match="in use by process 4321 on node-7"), run_lock(tmp_path):
        pass
    assert (tmp_path / "run.lock").read_text() == beat


def test_a_holder_on_another_machine_that_is_silent_blocks_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: Holder
) -> None:
    monkeypatch.setattr(lock, "SILENT_S", 0.2)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["host"] == socket.gethostname()


def test_a_holder_that_was_given_up_leaves_the_lock_to_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: Holder
) -> None:
    """This machine was suspended, and another one took the lock over."""
    monkeypatch.setattr(lock, "SILENT_S", 0.0)
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    taken = json.dumps(asdict(elsewhere))
    with run_lock(tmp_path) as held:
        (tmp_path / "run.lock").write_text(taken)
        held._beating.join(timeout=30)
        assert not held._beating.is_alive()
    assert (tmp_path / "run.lock").read_text() == taken


def test_a_holder_counts_and_a_disk_without_flock_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.01)

    def unsupported(file: int, how: int) -> None:
        raise OSError(lock.errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    counted = threading.Event()
    write = FolderLock._write

    def note(held: FolderLock) -> None:
        write(held)
        if held._me.beats >= 2:
            counted.set()

    monkeypatch.setattr(FolderLock, "_write", note)
    with run_lock(tmp_path):
        assert counted.wait(timeout=30)
        assert json.loads((tmp_path / "run.lock").read_text())["beats"] >= 2


# Caches --------------------------------------------------------------------------------------------------------------


def test_a_cached_folder_is_made_once_by_whoever_comes_first(tmp_path: Path) -> None:
    folder, made = tmp_path / "cache" / "models" / "tiny-1.5", []
    begun, go_on = threading.Event(), threading.Event()

    def make(part: Path) -> None:
        made.append(part)
        part.mkdir()
        begun.set()
        assert go_on.wait(timeout=30)
        (part / "config.json").write_text("{}")
        assert not folder.exists()  # nobody sees half of it

    threads = [threading.Thread(target=made_once, args=(folder, make)) for _ in range(2)]
    threads[0].start()
    assert begun.wait(timeout=30)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(timeout=30)
    assert len(made) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-1.5"]
    assert (folder / "config.json").is_file()


def test_half_of_a_cached_folder_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"

    def die(part: Path) -> None:
        part.mkdir()
        (part / "torn").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(folder, die)
    assert not folder.exists()
    made_once(folder, Path.mkdir)
    assert list(folder.iterdir()) == []
