"""Runs of the real command with other algorithms: groups without a critic, and a critic with every option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import Place, Run, rows_of

STEPS, EPISODES, GROUP = 2, 16, 4
RUN = [
    "recipe=ppo_coding",
    f"steps={STEPS}",
    "model.start=''",
    f"buffer.episodes_per_step={EPISODES}",
    "eval.num_tasks=8",
    "eval.every=0",
    "checkpoint.every=1",
    "tracking.wandb=false",
    "tracking.sample_every=1",
    f"tracking.sample_episodes={EPISODES}",
]
GROUPS = [
    "run=groups",
    "task.target=partial_credit:PartialCredit",
    "policy.num_minibatches=2",
    "advantage.baseline=grpo",
    "advantage.whiten=false",
    f"buffer.episodes_per_prompt={GROUP}",
    "policy.loss=gspo",
    "policy.clip_low=3e-4",
    "policy.clip_high=4e-4",
    "policy.correction=icepop",
    "policy.kl_coef=0.01",
    "policy.kl=k2",
    "policy.entropy_coef=1e-3",
    "policy.nll_coef=0.01",
]
CRITIC = [  # on a task half of whose episodes have no turn, in more minibatches than there are others
    "run=critic",
    "task.target=misbehaving:Misbehaving",
    f"policy.num_minibatches={EPISODES}",
    f"critic.num_minibatches={EPISODES}",
    f"critic.warmup_episodes={2 * EPISODES}",
    "critic.value_range=[-1.0,2.0]",
    "critic.value_clip=0.2",
    "critic.freeze=['*self_attention*']",
    "advantage.truncation=bootstrap",
    "advantage.lambda_alpha=1.5",
    "advantage.lambda_length=sub_trace",
    "policy.loss=decoupled",
    "policy.kl_coef=0.01",
    "policy.kl=k1",
    "policy.kl_in=reward",
    "policy.train_summaries=false",
]

pytestmark = pytest.mark.e2e


def played(place: Place, warm_start: Path, overrides: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return metrics by step, and the trained episodes."""
    with Run(place, *RUN, *overrides, f"model.path={warm_start}") as run:
        run.finish()
    run_dir = place.run_dir(overrides[0].removeprefix("run="))
    episodes = [record for record in rows_of(run_dir / "episodes.jsonl") if record["split"] == "train"]
    rows = rows_of(run_dir / "metrics.jsonl")
    assert len(episodes) == sum(EPISODES - row["rollout/num_without_turn"] for row in rows[1:])
    return rows, episodes


def test_a_group_baseline_needs_no_critic(place: Place, warm_start: Path) -> None:
    rows, episodes = played(place, warm_start, GROUPS)
    assert not (place.run_dir("groups") / "checkpoints" / f"step_{STEPS:06d}" / "critic").exists()
    for row in rows[1:]:
        assert not [name for name in row if name.startswith("critic/")]
        assert row["policy/grad_norm"] > 0
        assert row["policy/entropy"] > 0
        assert 0 <= row["advantage/zero_signal_groups"] <= 1
    assert rows[1]["policy/reference_kl"] == pytest.approx(0, abs=1e-6)  # before the first update they are one
    assert rows[2]["policy/reference_kl"] > 1e-6
    for step in range(1, STEPS + 1):
        of_step = [record for record in episodes if record["step"] == step]
        groups: dict[int, list[dict[str, Any]]] = {}
        for record in of_step:
            groups.setdefault(record["row"], []).append(record)
        assert [len(group) for group in groups.values()] == [GROUP] * (EPISODES // GROUP)
        for group in groups.values():
            check_group(group)


def check_group(group: list[dict[str, Any]]) -> None:
    """All tokens of an episode have the same advantage; its sign is that of the reward minus the group's mean."""
    mean = sum(record["reward"] for record in group) / len(group)
    for record in group:
        tokens = [token for sub_trace in record["sub_traces"] for token in sub_trace["tokens"] if token["action"]]
        advantages = {token["advantage"] for token in tokens}
        assert len(advantages) == 1
        (advantage,) = advantages
        above = record["reward"] - mean
        assert advantage == pytest.approx(0, abs=1e-5) if abs(above) < 1e-9 else advantage * above > 0


def test_a_critic_with_bounds_frozen_attention_bootstrap_and_kl_in_its_returns(place: Place, warm_start: Path) -> None:
    rows, episodes = played(place, warm_start, CRITIC)
    assert rows[0]["critic/warmup_episodes"] == 2 * EPISODES
    assert rows[0]["rollout/tokens_generated"] > 0
    assert (rows[0]["eval/num_tasks"], rows[0]["eval/num_without_turn"]) == (4, 4)
    assert 0 < rows[1]["rollout/num_without_turn"] < EPISODES
    for row in rows[1:]:
        assert row["rollout/num_episodes"] == EPISODES
        means = [record["reward"] for record in episodes if record["step"] == row["step"]]
        assert row["rollout/reward_mean"] == pytest.approx(sum(means) / len(means))
        assert row["policy/gradient_share/summary"] == 0
        assert row["critic/grad_norm"] > 0
        assert 0 <= row["critic/clip_fraction"] < 1
    values = [
        token["value"]
        for record in episodes
        for sub_trace in record["sub_traces"]
        for token in sub_trace["tokens"]
        if token["action"]
    ]
    assert min(values) > -1
    assert max(values) < 2
    assert len(set(values)) > len(values) // 2
