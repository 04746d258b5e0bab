"""The end of a failed run: one line, an exit code, and the details in a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from ray.core.generated.common_pb2 import ActorDeathCause  # type: ignore[attr-defined]  # made at run time
from tree import ROOT

from buffer.config import BufferConfig
from buffer.store import Store
from launch import deaths, supervisor
from launch.deaths import ProcessDied
from launch.supervisor import Supervisor
from machine.failures import MAX_CHARACTERS, ending, reason
from slime.observe import failures as module
from slime.observe.failures import Failures
from slime.observe.standing import Standing, State, read_status

LIMIT_S = 60.0
STORE = ROOT / "buffer" / "store.py"


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """No death is awaited that could explain an error."""
    monkeypatch.setattr(module, "SETTLE_S", 0.0)


class Refusal(Exception):
    """Of what the user asked for."""


class FromAnotherProcess(RuntimeError):
    """As Ray passes errors on: the cause without its trace, which comes as text."""

    def __init__(self, cause: Exception, trace: str) -> None:
        super().__init__(f"ray::Worker.update() (pid=7)\n{trace}\n{cause}")
        self.cause, self.traceback_str = cause, trace


def of_a_user(source: str, folder: Path) -> BaseException:
    """Return the error that `step` in a user's file raises."""
    path = folder / "my_task.py"
    space: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), space)
    with pytest.raises((KeyError, ValueError, AssertionError)) as caught:
        space["step"]()
    return caught.value


# One line ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def step():\n    return {}['prompt']\n", "KeyError: 'prompt' (my_task.py:2 in step)"),
        ("def step():\n    raise ValueError('a\\n\\n  b')\n", "ValueError: a b (my_task.py:2 in step)"),
        ("import ast\ndef step():\n    ast.literal_eval('f()')\n", "(my_task.py:3 in step)"),  # raised in a library
        ("def step():\n    assert 0\n", "AssertionError (my_task.py:2 in step)"),
    ],
)
def test_an_error_of_a_users_code_is_told_with_type_and_place(source: str, line: str, tmp_path: Path) -> None:
    found = reason(of_a_user(source, tmp_path))
    assert found.endswith(line)
    assert "\n" not in found


def test_a_sentence_of_this_code_stands_alone() -> None:
    with pytest.raises(ValueError, match="num_rows") as caught:
        Store(BufferConfig(), 0, 0)
    assert reason(caught.value) == "num_rows=0: the task file must have at least one row"


@pytest.mark.parametrize(
    ("cause", "trace", "line"),
    [
        (
            ZeroDivisionError("division by zero"),
            'File "/opt/lib/ray/worker.py", line 7, in run\n  File "/home/me/env.py", line 12, in reward\n    1 / 0\n',
            "ZeroDivisionError: division by zero (env.py:12 in reward)",
        ),
        (RuntimeError("row 3 failed"), f'File "{STORE}", line 9, in fail\n', "row 3 failed"),
    ],
)
def test_an_error_of_another_process_is_told_as_it_was_raised_there(cause: Exception, trace: str, line: str) -> None:
    assert reason(FromAnotherProcess(cause, trace)) == line


def test_an_error_of_a_constructor_is_the_last_line_of_what_ray_says() -> None:
    error = RuntimeError("The actor died because of an error raised in its creation task\n  File x\nOSError: full\n")
    error.actor_init_failed = True  # type: ignore[attr-defined]
    assert reason(error) == "OSError: full"


def test_a_reason_is_short() -> None:
    assert len(reason(RuntimeError("word " * 1000))) < MAX_CHARACTERS + 10


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (-6, "was killed by SIGABRT"),
        (-9, "was killed by SIGKILL, e.g. by the out-of-memory killer"),
        (137, "was killed by SIGKILL, e.g. by the out-of-memory killer"),
        (255, "ended with exit code 255"),
    ],
)
def test_how_a_process_ended(code: int, words: str) -> None:
    assert ending(code) == words


# A run that fails ----------------------------------------------------------------------------------------------------


def test_the_first_error_is_told_at_once_and_all_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "error.log"
    with Failures(tmp_path / "logs") as failures:
        try:
            with failures.at_once():
                raise KeyError("first")
        finally:
            told = capsys.readouterr().err
            with failures.aside("stopping the engines"):
                raise TimeoutError("second")
    assert failures.exit_code == 1
    assert told.startswith("slime: error: KeyError: 'first' (test_failures.py:")
    assert told.endswith(f"; traceback: {log}\n")
    assert told.count("\n") == 1
    assert capsys.readouterr() == ("", "")
    kept = log.read_text()
    assert "raise KeyError" in kept
    assert "raise TimeoutError" in kept
    assert kept.index("first") < kept.index("stopping the engines: ")


def test_an_error_aside_of_a_good_run_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Failures(tmp_path) as failures, failures.aside("W&B failed"):
        raise OSError("no network")
    assert failures.exit_code == 0
    assert capsys.readouterr().err.startswith("slime: warning: W&B failed: OSError: no network")


def test_a_refusal_leaves_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Failures(tmp_path, (Refusal,)) as failures, failures.at_once():
        raise Refusal("steps: 3 -> 4\nsince the last start")
    assert failures.exit_code == 2
    assert capsys.readouterr().err == "slime: error: steps: 3 -> 4 since the last start\n"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_hides_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").touch()  # so that no folder can be made there
    with Failures(tmp_path / "logs") as failures:
        raise LookupError("the reason")
    assert failures.exit_code == 1
    err = capsys.readouterr().err
    assert "the reason" in err
    assert "traceback could not be written" in err
    assert err.count("\n") == 1


# Signals and deaths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_ends_a_run_in_order(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This also holds if the signal comes twice, as from a terminal, which sends it to a shell and its script."""
    monkeypatch.setattr(supervisor, "TOGETHER_S", LIMIT_S)
    stopped = []
    outside = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        before = [signal.getsignal(one) for one in supervisor.SIGNALS]
        with Failures(tmp_path) as failures:
            try:
                with failures.at_once():
                    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
                    threading.Event().wait(LIMIT_S)
            finally:
                os.kill(os.getpid(), number)
                stopped.append("parts")
        assert [signal.getsignal(one) for one in supervisor.SIGNALS] == before
    finally:
        signal.signal(number, outside)
    assert (failures.exit_code, stopped) == (code, ["parts"])
    assert capsys.readouterr().err == f"slime: stopped by {number.name} before its first step\n"


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (TimeoutError("1 of 8 episodes are missing after 3 s"), True),
        (RuntimeError("ticket 3 failed 4 times: /generate: no answer from http://127.0.0.1:1 within 5 s"), True),
        (TimeoutError("policy.update: no answer from policy rank 1 in 3 s; stacks: elsewhere"), False),
        (RuntimeError("row 3 failed"), False),
    ],
)
def test_a_wait_that_was_too_long_keeps_stacks(
    error: Exception, kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Failures(tmp_path) as failures, failures.at_once():
        raise error
    told = capsys.readouterr().err
    assert f"{error}" in told
    assert told.count("; stacks: ") == kept + ("stacks" in str(error))
    found = list(tmp_path.glob("stacks/*/driver.txt"))
    assert len(found) == kept
    assert all("test_a_wait_that_was_too_long_keeps_stacks" in path.read_text() for path in found)


def test_ctrl_c_says_where_the_run_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "checkpoints" / "step_000004" / "state.json"
    (tmp_path / "config.yaml").touch()
    for stands in ("no checkpoint yet: the same command begins anew", "checkpoint of step 4: the same command goes on"):
        with Failures(tmp_path / "logs") as failures, failures.at_once():
            failures.standing = Standing(tmp_path, 6, 50)
            os.kill(os.getpid(), signal.SIGINT)
        err = capsys.readouterr().err
        assert err.startswith(f"slime: stopped by SIGINT after step 6 of 50; {stands}")
        assert err.count("\n") == 1
        saved.parent.mkdir(parents=True, exist_ok=True)
        saved.touch()
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["steps"], status["checkpoint"]) == ("stopped", 6, 50, 4)


def test_a_run_that_has_not_begun_leaves_no_state(tmp_path: Path) -> None:
    Standing(tmp_path, 0, 50).write(State.running)
    assert list(tmp_path.iterdir()) == []
    assert read_status(tmp_path) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_launchers_signal_is_heeded_by_the_run_itself(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    with Failures(tmp_path / "logs") as failures, failures.at_once():
        failures.standing = Standing(tmp_path, 6, 50)
        with failures.graceful(LIMIT_S):
            assert failures.supervisor.asked is None
            os.kill(os.getpid(), number)
            assert failures.supervisor.asked is number  # nothing was interrupted
        failures.to_be_continued()
    assert failures.exit_code == 75
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"slime: {number.name}: the run saves its state and ends, within 60 s")
    assert told[1:] == [f"slime: stopped by {number.name} {Standing(tmp_path, 6, 50)}"]
    assert read_status(tmp_path)["state"] == "to be continued"


def test_a_run_that_does_not_heed_a_launcher_in_time_is_interrupted(tmp_path: Path) -> None:
    waited = []
    with Failures(tmp_path) as failures, failures.at_once(), failures.graceful(0.1):
        os.kill(os.getpid(), signal.SIGTERM)
        waited.append("in the block")
        time.sleep(LIMIT_S)
        waited.append("for ever")
    assert waited == ["in the block"]
    assert failures.exit_code == 75


def test_a_failure_after_a_launchers_signal_is_told_and_the_run_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends other processes of the run, too: it must not take that for a failure of the run."""
    with Failures(tmp_path) as failures, failures.at_once(), failures.graceful(LIMIT_S):
        os.kill(os.getpid(), signal.SIGUSR1)
        raise RuntimeError("policy rank 1 has ended")
    assert failures.exit_code == 75
    assert "policy rank 1 has ended" in capsys.readouterr().err


def test_children_never_receive_a_signal_that_this_process_does(tmp_path: Path) -> None:
    come = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: come.append(number))
    program = "import os, signal, sys; os.kill(os.getpid(), signal.SIGUSR1); sys.exit(7)"
    grandchild = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {program!r}]).returncode)"
    try:
        with supervisor.not_by_children():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert subprocess.run([sys.executable, "-c", grandchild], check=False, timeout=LIMIT_S).returncode == 7
        assert come == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_signal_ends_a_run_at_once(tmp_path: Path) -> None:
    program = f"""
    import subprocess, time
    from pathlib import Path
    from slime.observe.failures import Failures
    with Failures(Path({str(tmp_path)!r})) as failures:
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        try:
            with failures.at_once():
                print(child.pid, flush=True)  # in the block that the first signal is to end
                time.sleep(600)
        finally:
            print("ending", flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "ending\n"
        deadline = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < deadline:  # signals that come together count once
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert process.poll() == 143
    assert not child.is_running()


def test_an_ignored_hangup_stays_ignored_and_an_ignored_interrupt_does_not(tmp_path: Path) -> None:
    """nohup ignores SIGHUP, and a shell script ignores SIGINT in commands that it starts with `&`."""
    handlers = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGHUP, signal.SIGINT)}
    passed = []
    try:
        with Failures(tmp_path) as failures:
            os.kill(os.getpid(), signal.SIGHUP)
            passed.append("hangup")
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(LIMIT_S)
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
    assert passed == ["hangup"]
    assert failures.exit_code == 130


def test_a_death_interrupts_whatever_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "engine_0.log"
    log.write_text("its last words\n")
    waiting = threading.Event()
    death = ProcessDied("engine 0 was killed by SIGKILL", log)
    monkeypatch.setattr(Supervisor, "_death", lambda self: death if waiting.is_set() else None)
    began = time.monotonic()
    with Failures(tmp_path / "logs") as failures, failures.at_once():
        waiting.set()
        time.sleep(LIMIT_S)
    assert time.monotonic() - began < LIMIT_S / 2
    assert failures.exit_code == 1
    assert capsys.readouterr().err == f"slime: error: engine 0 was killed by SIGKILL; log: {log}\n"
    kept = (tmp_path / "logs" / "error.log").read_text()
    assert "its last words" in kept
    assert "time.sleep(LIMIT_S)" in kept  # what was waited for


def test_a_death_is_told_in_place_of_its_consequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that loses its peer complains before the peer's end is seen."""
    seen = threading.Event()
    monkeypatch.setitem(deaths._watched, "1", deaths._Watched("policy rank 1", None, ""))
    death = ProcessDied("policy rank 1 was killed", None)
    monkeypatch.setattr(Supervisor, "_death", lambda self: death if seen.is_set() else None)
    with Failures(tmp_path) as failures, failures.at_once():
        threading.Timer(0.5, seen.set).start()
        raise RuntimeError("Connection closed by peer")
    assert failures.exit_code == 1
    assert capsys.readouterr().err == "slime: error: policy rank 1 was killed\n"
    assert "closed by peer" in (tmp_path / "error.log").read_text()


@pytest.mark.parametrize(
    ("message", "log", "words"),
    [
        ("Worker exits with an exit code 4.", ":actor_name:A\n", "ended with exit code 4"),
        (
            "connection error code 2. End of file.",
            "*** SIGSEGV received at time=1 on cpu 0 ***\n",
            "crashed by SIGSEGV",
        ),
        ("connection error code 2. End of file.", "", "was killed, e.g. by the out-of-memory killer"),
    ],
)
def test_how_a_worker_of_rays_ended(message: str, log: str, words: str, tmp_path: Path) -> None:
    cause = ActorDeathCause(actor_died_error_context={"error_message": message})
    (tmp_path / "worker.err").write_text(log)
    assert deaths._how(cause, tmp_path / "worker.err") == words
    assert deaths._how(ActorDeathCause(oom_context={"error_message": "node is\nfull"}), None).endswith("node is full")


@pytest.mark.e2e
def test_a_dead_actor_is_named_whatever_is_waited_for(
    ray_cluster: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Rank:  # in here it travels by value: Ray's processes can't import this module
        def work(self) -> int:
            return os.getpid()

    ranks = [ray_cluster.remote(Rank).options(num_cpus=0).remote() for _ in range(2)]
    with Failures(tmp_path) as failures, failures.at_once():
        for number, rank in enumerate(ranks):
            deaths.watch(f"policy rank {number}", rank)
        pids = ray_cluster.get([rank.work.remote() for rank in ranks], timeout=LIMIT_S)
        os.kill(pids[1], signal.SIGKILL)
        threading.Event().wait(LIMIT_S)  # for nothing of Ray's
    assert failures.exit_code == 1
    err = capsys.readouterr().err
    assert err.startswith(f"slime: error: policy rank 1 (pid {pids[1]} on ")
    assert f") was killed, e.g. by the out-of-memory killer; log: {tmp_path.anchor}" in err
    assert err.count("\n") == 1
    ray_cluster.kill(ranks[0])


def test_in_another_than_the_main_thread_no_signal_is_taken(tmp_path: Path) -> None:
    codes = []

    def work() -> None:
        with Failures(tmp_path) as failures:
            raise RuntimeError("x")
        codes.append(failures.exit_code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(LIMIT_S)
    assert codes == [1]
