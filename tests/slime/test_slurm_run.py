"""A training run as a job of a real Slurm, over both of its nodes: told to end, started again, finished."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import SLIME, START_S, Place, rows_of
from slurm import SlurmCluster, unavailable

from launch.slurm import client
from slime import checkpoint, cli

STEPS = 8  # of two seconds: some are left when the signal comes
RUN = [
    "recipe=ppo_coding",
    "run=job",
    "model.start=''",
    f"steps={STEPS}",
    "buffer.episodes_per_step=16",
    "rollout.num_workers=2",
    "cluster.num_nodes=2",
    "critic.warmup_episodes=0",
    "eval.num_tasks=8",
    "eval.every=0",
    "tracking.wandb=false",
]

pytestmark = pytest.mark.e2e


@dataclass
class Story:
    """What was seen of the job."""

    run_dir: Path
    log: str
    number: str
    waiting: str  # `slime status` between the two starts
    saved: list[int]  # checkpoints then
    done: str  # `slime status` at the end
    twice: tuple[int, str]  # exit code and words of a second submission


@pytest.fixture(scope="module")
def slurm(place: Place) -> Iterator[SlurmCluster]:
    if reason := unavailable():
        pytest.skip(reason)
    with SlurmCluster() as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in {**cluster.environment, "TMPDIR": str(place.temporary), "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        yield cluster


def slime(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([SLIME, *arguments], capture_output=True, text=True, timeout=START_S, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def story(slurm: SlurmCluster, place: Place) -> Story:
    run_dir = place.run_dir("job")
    places = [f"runs_dir={place.folder / 'runs'}", f"cache_dir={place.folder / 'cache'}"]
    command = ["submit", "slurm", *RUN, *places, "--time", "60", "--sbatch", "cpus-per-task=4"]
    code, said = slime(*command)
    assert code == 0, said
    number = client.known_job(run_dir / "slurm")
    log = run_dir / "slurm" / f"job_{number}.log"

    def wait(condition: Callable[[], bool], what: str, over: set[str] = client.ENDED) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            told = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            assert time.monotonic() < deadline, f"no {what}: {told}"
            assert client.state_of(client.describe(number)) not in over, told
            time.sleep(0.2)

    metrics = run_dir / "metrics.jsonl"
    wait(log.exists, "start")
    twice = slime(*command)
    wait(lambda: bool(rows_of(metrics)) and rows_of(metrics)[-1]["step"] >= 1, "step 1")
    slurm.call("scancel", "--signal=TERM", number)  # to every process of every step, as a preemption does
    wait(lambda: client.state_of(client.describe(number)) == "PENDING", "requeue")
    waiting, saved = slime("status", str(run_dir))[1], checkpoint.steps(run_dir)
    slurm.call("scontrol", "update", f"jobid={number}", "StartTime=now")
    wait(lambda: client.state_of(client.describe(number)) == "COMPLETED", "end", client.ENDED - {"COMPLETED"})
    return Story(run_dir, log.read_text(), number, waiting, saved, slime("status", str(run_dir))[1], twice)


def test_a_job_saves_before_its_end_and_goes_on(story: Story) -> None:
    (saved,) = story.saved
    assert 1 <= saved < STEPS  # checkpoint.every=10
    assert f"stopped by SIGTERM after step {saved} of {STEPS}; checkpoint of step {saved}" in story.log
    assert "the run was told to end by SIGTERM: the job goes back into the queue" in story.log
    assert f"resumed at step {saved}" in story.log
    assert "*** SIGTERM received" not in story.log  # by Ray, as a crash
    assert [row["step"] for row in rows_of(story.run_dir / "metrics.jsonl")] == list(range(STEPS + 1))
    assert (story.run_dir / "model" / "model.safetensors").is_file()


def test_ray_spans_the_nodes_of_the_job(story: Story) -> None:
    folder = story.run_dir / "slurm"
    for node, address in (("node1", "127.0.0.2"), ("node2", "127.0.0.3")):
        log = (folder / f"node_{node}_{story.number}.log").read_text()
        assert log.count("Ray runtime started") == 2, log
        assert f"Local node IP: {address}" in log
    assert not list(folder.glob(".ray_token*"))


def test_status_tells_of_run_and_job(story: Story) -> None:
    (saved,) = story.saved
    assert story.waiting.startswith(f"job: to be continued, step {saved} of {STEPS}, checkpoint of step {saved}")
    assert f"job {story.number}: PENDING" in story.waiting
    assert story.done.startswith(f"job: finished, step {STEPS} of {STEPS}, checkpoint of step {STEPS}")
    assert f"job {story.number}: COMPLETED, None, starts 2" in story.done


def test_a_run_has_one_job(story: Story) -> None:
    code, said = story.twice
    assert (code, said.count("\n")) == (2, 1)
    assert f"has job {story.number}, which is RUNNING: end it with slime cancel job" in said


def test_logs_of_a_job(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", str(story.run_dir), "--lines", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == story.log.splitlines()[-2:]
    assert cli.main(["logs", str(story.run_dir), "--node", "node9"]) == 2
    assert f"there is job_{story.number}.log, node_node1_{story.number}.log, " in capsys.readouterr().err
    assert cli.main(["cancel", str(story.run_dir)]) == 0
    assert capsys.readouterr().out == f"job {story.number} has ended already\n"
