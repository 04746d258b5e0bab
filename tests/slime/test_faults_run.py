"""Runs of the real command that do not end well: what they say, and that nothing is left of them."""

from __future__ import annotations

import signal

import pytest
from runs import START_S, Place, Run

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
    """What it says to the user at its end."""
    return [line for line in run.output.splitlines() if line.startswith("slime: ")]


def tokens(place: Place) -> set[str]:
    """Folders of runs' secrets in the folder for temporary files."""
    return {path.name for path in place.temporary.iterdir() if path.name.startswith("slime-ray-")}


def test_a_killed_engine_is_named_and_takes_the_run_with_it(place: Place) -> None:
    """Its scheduler is killed, as the out-of-memory killer does, while episodes are in flight."""
    before = tokens(place)
    with Run(place, *RUN, "run=killed") as run:
        run.wait_until(lambda: "... eval" in run.output, "first evaluation", START_S)
        (scheduler,) = [one for one in run.processes() if "sglang::scheduler" in " ".join(one.cmdline())]
        scheduler.kill()
        assert run.process.wait(LIMIT_S) == 1, run.tail()
        assert run.left_over() == []
    logs = place.run_dir("killed") / "logs"
    killed = "was killed by SIGKILL, e.g. by the out-of-memory killer"
    reason = f"engine 0 has ended, because its process scheduler_0 {killed}"
    assert last_words(run) == [f"slime: error: {reason}; log: {logs / 'engine_0.log'}"]
    assert "Traceback" not in run.output
    assert "last lines of" in (logs / "error.log").read_text()
    assert tokens(place) <= before


def test_a_run_that_is_told_to_end_ends_in_order(place: Place) -> None:
    """While its engine starts, and told twice."""
    before = tokens(place)
    with Run(place, *RUN, "run=stopped") as run:
        log = place.run_dir("stopped") / "logs" / "engine_0.log"
        run.wait_until(lambda: log.exists() and log.stat().st_size > 0, "engine's first line", START_S)
        seen = run.processes()
        run.process.send_signal(signal.SIGTERM)
        run.wait_until(lambda: last_words(run) != [], "last words", LIMIT_S)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(LIMIT_S) == 143, run.tail()
        assert len(seen) > 8
        assert run.left_over() == []
    assert last_words(run) == ["slime: stopped by SIGTERM; the same command goes on from the newest checkpoint"]
    assert "Traceback" not in run.output
    assert tokens(place) <= before
