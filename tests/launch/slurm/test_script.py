"""The batch script of a job, and whether it starts again, without Slurm."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm import client, job
from launch.slurm.node import own_address, ray_command
from launch.slurm.script import BatchJob, problems, render, seconds

JOB = BatchJob("demo", Path("/runs/demo/slurm"), Path("/work"), ["python", "-m", "x", "a b"], 2, 8, 60.0, "4:00:00")


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_a_job_asks_for_its_nodes_alone_and_for_a_signal_before_its_end() -> None:
    asked = options(render(JOB))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gres"]) == ("2", "1", "gpu:8")
    assert (asked["exclusive"], asked["mem"]) == ("", "0")
    assert asked["signal"] == "B:USR1@180"  # checkpoint.grace_s and the end of the run's processes
    assert asked["open-mode"] == "append"
    assert asked["output"] == "/runs/demo/slurm/job_%j.log"
    assert "requeue" in asked
    assert render(JOB).splitlines()[-1] == "exec python -m x 'a b'"


def test_a_job_that_shares_its_nodes_says_how() -> None:
    asked = options(render(replace(JOB, gpus_per_node=0, options={"cpus-per-task": "4", "partition": "a b"})))
    assert asked.keys().isdisjoint({"exclusive", "mem", "gres"})
    assert (asked["cpus-per-task"], asked["partition"]) == ("4", "'a b'")


def test_shells_read_the_script(tmp_path: Path) -> None:
    work = tmp_path / "it's here"
    work.mkdir()
    command = ["sh", "-c", 'pwd; echo "$1 $MADE"', "sh", "$(not run)"]
    script = tmp_path / "job.sh"
    script.write_text(render(replace(JOB, work_dir=work, command=command, setup=["export MADE=before"])))
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{work}\n$(not run) before\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:10", 5410),
        ("2-1", 176_400),
        ("2-1:30", 178_200),
        ("2-1:30:05", 178_205),
    ],
)
def test_time_limits(text: str, found: int) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"time_limit": "3"}, "--time 3 is 180 s, and the run is told to end 180 s before it"),
        ({"time_limit": "soon"}, "--time soon: must be MINUTES"),
        ({"options": {"signal": "TERM@5"}}, "--sbatch signal: slime sets this option itself"),
        ({"options": {"Mem": "1"}}, "--sbatch Mem=1: must be NAME=VALUE"),
        ({"options": {"comment": "a\nb"}}, "must be NAME=VALUE"),
    ],
)
def test_what_can_not_work_is_refused(changed: dict[str, object], part: str) -> None:
    assert problems(JOB) == []
    (found,) = problems(replace(JOB, **changed))  # type: ignore[arg-type]
    assert part in found


def test_starts_without_a_new_checkpoint_are_counted_over_starts(tmp_path: Path) -> None:
    record = tmp_path / "progress.json"
    counted = []
    for number, newest in enumerate([0, 0, 4, 4, 4, 6]):
        counted.append(job.without_progress(record, job.Start("7", number, "a", ("a",)), newest))
    assert counted == [0, 1, 0, 1, 2, 0]
    assert job.without_progress(record, job.Start("8", 0, "a", ("a",)), 6) == 0  # another job


def test_a_job_outside_of_slurm_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert job.run_job(tmp_path, 0, 0, 3, ["true"]) == 1
    assert capsys.readouterr().err.startswith("slime: error: this is no batch job of Slurm's")


def test_a_node_is_found_where_its_peer_reaches_it() -> None:
    assert own_address("127.0.0.2", "127.0.0.1") == "127.0.0.2"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("192.0.2.1", 9))  # of no machine
        except OSError:
            pytest.skip("this machine has no network")
        mine = route.getsockname()[0]
    assert own_address("127.0.1.1", "192.0.2.1") == mine  # what a node's own name means on Debian
    assert own_address("192.0.2.7", "192.0.2.1") == mine  # an address that this node does not have


def test_the_head_and_the_others_are_told_apart() -> None:
    head, other = (
        ray_command("10.0.0.1:6379", host, 8, leads) for host, leads in (("10.0.0.1", True), ("10.0.0.2", False))
    )
    assert {"--head", "--port=6379", "--node-ip-address=10.0.0.1", "--num-gpus=8"} <= set(head)
    assert {"--address=10.0.0.1:6379", "--node-ip-address=10.0.0.2"} <= set(other)
    assert "--head" not in other


def test_without_slurm_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(client.SlurmError, match="sbatch is not on PATH"):
        client.submit(tmp_path / "job.sh")


def test_a_program_of_slurms_that_fails_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(client.SlurmError, match=r"^sbatch --parsable: sbatch: error: invalid partition$"):
        client.submit(tmp_path / "job.sh")
