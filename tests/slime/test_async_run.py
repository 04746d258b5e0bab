"""An asynchronous run of the real command: engines keep sampling while roles of two processes train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import Place, Run, rows_of

from buffer.config import BufferConfig

STEPS = 3
BUFFER = BufferConfig(episodes_per_step=16, slots=48, window=32)
RUN = [
    "recipe=ppo_coding",
    "run=async",
    f"steps={STEPS}",
    "model.start=''",
    "task.target=partial_credit:PartialCredit",
    f"buffer.episodes_per_step={BUFFER.episodes_per_step}",
    f"buffer.slots={BUFFER.slots}",
    f"buffer.window={BUFFER.window}",
    "rollout.num_workers=2",
    "rollout.episodes_in_flight=12",  # of 24 running episodes some are always in the middle of a turn
    "policy.loss=dis",
    "policy.clip_low=0.8",
    "policy.clip_high=3.0",
    "policy.num_minibatches=2",
    "policy.layout.num_processes=2",
    "policy.megatron.tensor_parallel=2",
    "critic.num_minibatches=2",
    "critic.layout.num_processes=2",
    "critic.warmup_episodes=0",
    "eval.num_tasks=8",
    "eval.every=0",
    "checkpoint.every=0",
    "tracking.wandb=false",
    "tracking.sample_every=1",
    f"tracking.sample_episodes={BUFFER.episodes_per_step}",
]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run_dir(place: Place, warm_start: Path) -> Path:
    with Run(place, *RUN, f"model.path={warm_start}") as run:
        run.finish()
        assert run.left_over() == []
    return place.run_dir("async")


def versions_of(record: dict[str, Any]) -> list[int]:
    """Return the weight versions of an episode's sampled tokens, in time order."""
    tokens = [token for sub_trace in record["sub_traces"] for token in sub_trace["tokens"]]
    return [token["version"] for token in tokens if token["action"]]


def test_lag_is_real_and_bounded(run_dir: Path) -> None:
    rows = rows_of(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["weights/version"] for row in rows] == list(range(STEPS + 1))
    lags = [row["weights/lag_max"] for row in rows[1:]]
    assert lags[0] == 0  # nothing older than the first weights
    assert 0 < max(lags) <= BUFFER.max_lag


def test_versions_of_tokens(run_dir: Path) -> None:
    """No token is older than the bound or newer than the weights before its step; later ones are not older."""
    records = [r for r in rows_of(run_dir / "episodes.jsonl") if r["split"] == "train"]
    assert len(records) == STEPS * BUFFER.episodes_per_step
    lags = {row["step"]: row["weights/lag_max"] for row in rows_of(run_dir / "metrics.jsonl")[1:]}
    for step in range(1, STEPS + 1):
        versions = [versions_of(record) for record in records if record["step"] == step]
        assert all(found == sorted(found) for found in versions)  # weights change between tokens, forwards only
        oldest, newest = min(map(min, versions)), max(map(max, versions))
        assert step - 1 - BUFFER.max_lag <= oldest
        assert newest <= step - 1
        assert step - 1 - oldest == lags[step]  # the sample holds every episode of the step


def test_engine_and_trainer_agree_on_the_current_version(run_dir: Path) -> None:
    differences = [row["policy/engine_logprob_diff_max"] for row in rows_of(run_dir / "metrics.jsonl")[1:]]
    assert differences[0] > 0  # all tokens of the first step are of the current version
    assert max(differences) <= 1e-4


def test_both_roles_learn_in_their_layouts(run_dir: Path) -> None:
    for row in rows_of(run_dir / "metrics.jsonl")[1:]:
        assert row["rollout/num_episodes"] == BUFFER.episodes_per_step
        assert 0 < row["rollout/reward_mean"] < 1
        assert row["policy/grad_norm"] > 0
        assert row["critic/grad_norm"] > 0
        assert 0 <= row["policy/clip_fraction"] < 0.5
