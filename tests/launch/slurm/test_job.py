"""Jobs of a real Slurm: told to end, put back into the queue, started again; without training."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from processes import every_process
from slurm import LIMIT_S, SlurmCluster, unavailable
from tree import ROOT

from launch.slurm import client
from launch.slurm.script import BatchJob, render

pytestmark = pytest.mark.e2e

# Stands where `slime train` is: each start does one step, and a launcher's signal ends it in order.
RUN = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
steps = sorted(folder.glob("checkpoint_*"))
print(f"start at step {len(steps)}", flush=True)
def end(number, frame):
    print(f"told to end by {signal.Signals(number).name}", flush=True)
    (folder / f"checkpoint_{len(steps) + 1}").touch()
    sys.exit(75)
signal.signal(signal.SIGUSR1, end)
signal.signal(signal.SIGTERM, end)
(folder / "began").write_text(str(len(steps)))
if len(steps) >= int(sys.argv[2]):
    sys.exit(0)
time.sleep(600)
"""
JOB = """
import sys
from pathlib import Path
from launch.slurm.job import run_job
folder = Path(sys.argv[1])
newest = len(list(folder.glob("checkpoint_*")))
sys.exit(run_job(folder, 0, newest, 2, [sys.executable, str(folder / "run.py"), str(folder), sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    if reason := unavailable():
        pytest.skip(reason)
    with SlurmCluster() as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


def submit(folder: Path, num_steps: int, run: str = RUN, partition: str = "ci") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "run.py").write_text(run)
    (folder / "job.py").write_text(JOB)
    command = [sys.executable, str(folder / "job.py"), str(folder), str(num_steps)]
    setup = [f"export PYTHONPATH={ROOT}"]
    options = {"cpus-per-task": "1", "partition": partition}
    job = BatchJob("test", folder, ROOT, command, 1, 0, 60.0, "10", options, setup)
    (folder / "job.sh").write_text(render(job))
    return client.submit(folder / "job.sh")


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)


def herald_listens() -> bool:
    """Return whether a herald handles SIGTERM: its interpreter takes a while to start on a busy machine."""
    for process in every_process():
        with contextlib.suppress(psutil.Error, OSError):
            if "launch.slurm.herald" in process.cmdline() and process.name().startswith("python"):
                status = Path(f"/proc/{process.pid}/status").read_text()
                caught = int(re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)[1], 16)  # type: ignore[index]
                return bool(caught >> (signal.SIGTERM - 1) & 1)
    return False


def begun(folder: Path) -> str:
    return (folder / "began").read_text() if (folder / "began").exists() else ""


def test_a_job_that_is_told_to_end_saves_and_starts_again_until_it_is_done(slurm: SlurmCluster, tmp_path: Path) -> None:
    """By the signal that comes before its time limit, then by that of a preemption."""
    job_id = submit(tmp_path, num_steps=2)
    for step, name in enumerate(("USR1", "TERM")):
        while begun(tmp_path) != str(step):
            assert slurm.job(job_id)["JobState"] in ("PENDING", "RUNNING")
            time.sleep(0.1)
        slurm.call("scancel", "--batch", f"--signal={name}", job_id)
        wait(lambda: slurm.job(job_id)["JobState"] == "PENDING", "requeue")
        slurm.call("scontrol", "update", f"jobid={job_id}", "StartTime=now")
    slurm.wait_for(job_id, "COMPLETED")
    log = (tmp_path / f"job_{job_id}.log").read_text()
    assert [line for line in log.splitlines() if line.startswith(("start ", "told "))] == [
        *("start at step 0", "told to end by SIGUSR1", "start at step 1", "told to end by SIGTERM", "start at step 2")
    ]
    for name in ("USR1", "TERM"):
        assert f"the run was told to end by SIG{name}: the job goes back into the queue" in log
    assert client.describe(job_id)["Restarts"] == "2"


def test_a_preempted_job_saves_within_its_grace_time_and_starts_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Which is a minute here: what is told at its end comes too late."""
    job_id = submit(tmp_path, num_steps=1, partition="low")
    wait(lambda: begun(tmp_path) == "0", "start")
    wait(herald_listens, "herald")
    (tmp_path / "other.sh").write_text("#!/bin/sh\n")
    options = ["--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    other = slurm.call("sbatch", *options, str(tmp_path / "other.sh")).strip()
    wait(lambda: (tmp_path / "checkpoint_1").exists(), "checkpoint")
    slurm.wait_for(other, "COMPLETED")
    wait(lambda: slurm.job(job_id)["JobState"] != "COMPLETING", "requeue")
    slurm.call("scontrol", "update", f"jobid={job_id}", "StartTime=now")
    slurm.wait_for(job_id, "COMPLETED")
    log = (tmp_path / f"job_{job_id}.log").read_text()
    assert "the run was told to end by SIGTERM: the job goes back into the queue" in log
    assert "start at step 1" in log


def test_a_job_whose_node_dies_starts_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, num_steps=1)
    wait(lambda: begun(tmp_path) == "0", "start")
    (tmp_path / "checkpoint_1").touch()
    node = client.describe(job_id)["NodeList"]
    slurm.kill_node(node)
    wait(lambda: begun(tmp_path) == "1", "start on another node")
    slurm.wait_for(job_id, "COMPLETED")
    slurm.start_node(node)
    wait(lambda: slurm.states() == {"node1": "IDLE", "node2": "IDLE"}, "nodes")


def test_a_job_knows_a_node_that_does_not_answer(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Long before Slurm does."""
    program = f"""
    import time
    from pathlib import Path
    from launch.slurm.job import nodes_answer
    print(nodes_answer(2), flush=True)
    while not Path("{tmp_path}/killed").exists():
        time.sleep(0.1)
    print(nodes_answer(2, limit_s=5.0), flush=True)
    """
    (tmp_path / "probe.py").write_text(textwrap.dedent(program))
    (tmp_path / "job.sh").write_text(f"#!/bin/sh\nPYTHONPATH={ROOT} {sys.executable} {tmp_path / 'probe.py'}\n")
    log = tmp_path / "log"
    options = ["--parsable", "--no-requeue", "--nodes=2", f"--output={log}"]
    job_id = slurm.call("sbatch", *options, str(tmp_path / "job.sh")).strip()
    wait(lambda: log.exists() and log.read_text().endswith("True\n"), "answers")
    slurm.kill_node("node2")
    (tmp_path / "killed").touch()
    wait(lambda: log.read_text().endswith("False\n"), "no answer")
    slurm.call("scancel", job_id)
    slurm.start_node("node2")
    wait(lambda: slurm.states() == {"node1": "IDLE", "node2": "IDLE"}, "nodes")


def test_a_job_without_progress_does_not_start_for_ever(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, 1, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    for _ in range(2):
        wait(lambda: slurm.job(job_id)["JobState"] in ("PENDING", "FAILED"), "requeue")
        slurm.call("scontrol", "update", f"jobid={job_id}", "StartTime=now")
        wait(lambda: slurm.job(job_id)["JobState"] != "PENDING", "start")
    slurm.wait_for(job_id, "FAILED")
    log = (tmp_path / f"job_{job_id}.log").read_text()
    assert log.count("the run was killed by SIGKILL, e.g. by the out-of-memory killer: the job goes back") == 2
    assert f"job {job_id} has started 2 times without a checkpoint after step 0, --max-starts is 2" in log


def test_a_failed_run_is_not_started_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, 1, "raise SystemExit(1)")
    slurm.wait_for(job_id, "FAILED")
    assert client.describe(job_id)["Restarts"] == "0"
    assert not client.lives(client.describe(job_id))
    assert client.describe("999999") == {}


def test_a_job_is_cancelled_with_its_state_saved(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, num_steps=3)
    wait(lambda: begun(tmp_path) == "0", "start")
    assert client.cancel(tmp_path, job_id, now=False) == f"job {job_id} saves its state and ends"
    slurm.wait_for(job_id, "COMPLETED")
    assert (tmp_path / "checkpoint_1").exists()
    assert client.cancel(tmp_path, job_id, now=False) == f"job {job_id} has ended already"


def test_a_job_is_cancelled_at_once(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, num_steps=3, run="import time; time.sleep(600)")
    slurm.wait_for(job_id, "RUNNING")
    assert client.cancel(tmp_path, job_id, now=True) == f"job {job_id} is cancelled"
    slurm.wait_for(job_id, "CANCELLED")


def test_nodes_have_addresses(slurm: SlurmCluster) -> None:
    assert client.addresses(["node1", "node2"]) == {"node1": "127.0.0.2", "node2": "127.0.0.3"}
    with pytest.raises(client.SlurmError, match="node3"):
        client.addresses(["node3"])
