"""Runs of the real command that fail: their messages, and that no process or file remains."""

from __future__ import annotations

import signal

import pytest
from runs import START_S, Place, Run, rows_of

from slime import checkpoint
from slime.observe.standing import read_status

LIMIT_S = 180.0  # generous: for what takes seconds
RUN = [
    "recipe=ppo_coding",
    "model.start=''",
    "steps=3",
    "critic.warmup_episodes=0",
    "eval.num_tasks=8",
    "rollout.num_workers=2",
    "tracking.wandb=false",
]

pytestmark = pytest.mark.e2e


def last_words(run: Run) -> list[str]:
    """Return the run's last message to the user."""
    return [line for line in run.output.splitlines() if line.startswith("slime: ")]


def tokens(place: Place) -> set[str]:
    """Return the folders of runs' secrets in the folder for temporary files."""
    return {path.name for path in place.temporary.iterdir() if path.name.startswith("slime-ray-")}


def test_a_killed_process_of_rays_is_named_and_takes_the_run_with_it(place: Place) -> None:
    """It is killed while episodes are in flight, as by the out-of-memory killer."""
    before = tokens(place)
    with Run(place, *RUN, "run=killed") as run:
        run.wait_until(lambda: "... eval" in run.output, "first evaluation", START_S)
        raylet = run.one("ray/raylet/raylet")
        raylet.kill()
        assert run.process.wait(LIMIT_S) == 1, run.tail()
        assert run.left_over() == []
    (words,) = last_words(run)
    assert words.startswith(f"slime: error: Ray's raylet (pid {raylet.pid}) was killed by SIGKILL")
    assert "Traceback" not in run.output
    assert "last lines of" in (place.run_dir("killed") / "logs" / "error.log").read_text()
    assert tokens(place) <= before


def test_a_run_that_is_told_to_end_ends_in_order_and_goes_on(place: Place) -> None:
    """The signal comes while the engine starts, then in the middle of a step; the second one goes to every process."""
    before = tokens(place)
    folder = place.run_dir("stopped")
    with Run(place, *RUN, "run=stopped") as run:
        log = folder / "logs" / "engine_0.log"
        run.wait_until(lambda: log.exists() and log.stat().st_size > 0, "engine's first line", START_S)
        seen = run.processes()
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(LIMIT_S) == 75, run.tail()
        assert len(seen) > 8
        assert run.left_over() == []
    stands = "after step 0 of 3; no checkpoint yet: the same command begins anew"
    assert last_words(run) == [f"slime: stopped by SIGTERM {stands}"]
    assert "Traceback" not in run.output
    assert tokens(place) <= before

    metrics = folder / "metrics.jsonl"
    with Run(place, *RUN, "run=stopped") as run:
        run.wait_until(lambda: bool(rows_of(metrics)) and rows_of(metrics)[-1]["step"] == 1, "step 1", START_S)
        for process in run.processes():
            if process.pid != run.process.pid:
                process.send_signal(signal.SIGUSR1)
        run.process.send_signal(signal.SIGUSR1)
        assert run.process.wait(LIMIT_S) == 75, run.tail()
        assert run.left_over() == []
    done = rows_of(metrics)[-1]["step"]
    assert 1 <= done < 3
    assert checkpoint.steps(folder) == [done]  # checkpoint.every=10
    stands = f"after step {done} of 3; checkpoint of step {done}: the same command goes on from there"
    assert last_words(run)[1:] == [f"slime: stopped by SIGUSR1 {stands}"]
    status = read_status(folder)
    assert (status["state"], status["step"], status["checkpoint"]) == ("to be continued", done, done)

    with Run(place, *RUN, "run=stopped") as run:
        run.finish()
    assert f"resumed at step {done}" in run.output
    assert [row["step"] for row in rows_of(metrics)] == [0, 1, 2, 3]
    assert read_status(folder)["state"] == "finished"
