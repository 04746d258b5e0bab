"""Commands about jobs through the real `main`; programs of Slurm's are scripts that answer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.lock import run_lock
from slime import cli
from slime.observe.standing import Standing, State

SUBMIT = ["submit", "slurm", "recipe=ppo_coding", "model.start=''"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of Slurm's programs: `sbatch` accepts a job, others are added by a test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    answers(folder, "sbatch", "echo '12;ci'")
    return folder


def answers(folder: Path, name: str, line: str) -> None:
    program = folder / name
    program.write_text(f'#!/bin/sh\necho "$0 $@" >> {folder / "asked"}\n{line}\n')
    program.chmod(0o755)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = cli.main([*arguments])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_a_dry_run_shows_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--time", "04:00:00", "--partition", "gpu", "--sbatch", "qos=high", "--setup", "module load cuda"]
    assert cli.main([*SUBMIT, "cluster.num_nodes=2", *options, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --time=04:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --qos=high",
        "#SBATCH --signal=B:USR1@240",
        "module load cuda",
        f"cd {tmp_path}",
    ):
        assert line in out.splitlines()
    assert out.splitlines()[-1].endswith(
        "--max-starts=3 -- recipe=ppo_coding 'model.start='\"'\"''\"'\"'' cluster.num_nodes=2"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["submit", "recipe=ppo_coding"], "unknown command 'recipe=ppo_coding'; commands: slurm, k8s"),
        ([*SUBMIT, "polcy.loss=ppo"], "did you mean 'policy.loss'?"),
        ([*SUBMIT, "model=qwen3_8b", "cluster=gpu_2x8"], "model.path=models/Qwen3-8B: no such folder"),
        ([*SUBMIT, "cluster.ray_address=auto"], "cluster.ray_address is the job's own"),
        ([*SUBMIT, "--time", "3"], "--time 3 is 180 s"),
        ([*SUBMIT, "--sbatch", "requeue"], "--sbatch requeue: slime sets this option itself"),
        (["logs", "first"], "it was not submitted as a job"),
        (["cancel", "first"], "it was not submitted as a job; end it by Ctrl-C"),
        (["cancel", "none"], "no such run; runs: first"),
        (["cancel"], "cancel takes one RUN, found 0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], programs: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert part in refused(capsys, *arguments)
    assert not (programs / "asked").exists()


def test_a_job_is_submitted_once(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(SUBMIT) == 0
    folder = tmp_path / "runs" / "ppo_coding" / "slurm"
    assert capsys.readouterr().out.startswith(f"job 12: {folder / 'job_12.log'}; ")
    assert (programs / "asked").read_text() == f"{programs / 'sbatch'} --parsable {folder / 'job.sh'}\n"
    answers(programs, "scontrol", "echo 'JobId=12 JobState=PENDING Reason=Priority Restarts=0 NodeList='")
    assert "has job 12, which is PENDING: end it with slime cancel ppo_coding" in refused(capsys, *SUBMIT)
    assert cli.main(["status"]) == 0
    assert capsys.readouterr().out == "ppo_coding: not started\n  job 12: PENDING, Priority, starts 1\n"
    answers(programs, "scancel", "")
    assert cli.main(["cancel", "ppo_coding"]) == 0
    assert capsys.readouterr().out == "job 12 is cancelled\n"
    answers(programs, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert cli.main(["status", "ppo_coding"]) == 0
    assert "job 12: Slurm has forgotten it: it has ended" in capsys.readouterr().out
    assert cli.main(SUBMIT) == 0


def test_what_slurm_refuses_leaves_nothing(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers(programs, "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    assert "submit slurm: sbatch --parsable: sbatch: error: invalid partition" in refused(capsys, *SUBMIT)
    assert not (tmp_path / "runs").exists()


def test_status_tells_what_became_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "first"
    (folder / "checkpoints" / "step_000004").mkdir(parents=True)
    (folder / "checkpoints" / "step_000004" / "state.json").touch()
    (folder / "config.yaml").touch()
    (folder / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n')
    standing = Standing(folder, 5, 50)

    def status() -> str:
        assert cli.main(["status", "first"]) == 0
        return capsys.readouterr().out

    standing.write(State.running)
    with run_lock(folder):
        assert status().startswith("first: running, step 5 of 50, checkpoint of step 4, since ")
        assert f"held by process {os.getpid()} on " in status()
    (folder / "run.lock").write_text(json.dumps({"host": "a", "pid": 1, "started": "", "kernel": "another"}))
    assert "held by process 1 on a" in status()  # on another machine: by the age of its lock
    (folder / "run.lock").unlink()
    assert status().startswith("first: killed, to be continued by the same command, step 5 of 50")
    standing.write(State.continued, "SIGTERM")
    assert status().startswith("first: to be continued, step 5 of 50, checkpoint of step 4, SIGTERM (")


def test_logs_of_a_job_are_shown_from_their_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "first" / "slurm"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text('{"id": "12"}')
    assert "no job_12.log; the job waits" in refused(capsys, "logs", "first")
    (folder / "job_12.log").write_text("one\ntwo\nthree\n")
    (folder / "node_a_12.log").write_text("ray\n")
    assert cli.main(["logs", "first", "--lines", "2"]) == 0
    assert capsys.readouterr().out == "two\nthree\n"
    assert cli.main(["logs", "first", "--node", "a"]) == 0
    assert capsys.readouterr().out == "ray\n"
    assert "there is job_12.log, node_a_12.log" in refused(capsys, "logs", "first", "--node", "b")
