"""The ablation's arithmetic: curves over generated tokens, which runs reached a budget, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ablation
from slime.config import load


def test_a_curve_counts_the_tokens_of_pre_training() -> None:
    rows = [
        {"step": 0, "rollout/tokens_generated": 40.0, "eval/pass_rate": 0.1},
        {"step": 1, "rollout/tokens_generated": 10.0},
        {"step": 2, "rollout/tokens_generated": 10.0, "eval/pass_rate": 0.5},
    ]
    assert ablation.curve(rows) == [(40.0, 0.1), (60.0, 0.5)]


def test_runs_are_compared_at_a_budget_that_they_have_reached() -> None:
    found = {
        "chained": {"0": [(40.0, 0.0), (100.0, 0.6)], "1": [(40.0, 0.2), (80.0, 0.4)]},
        "grpo": {"0": [(0.0, 0.1), (50.0, 0.3)]},
    }
    assert ablation.reaching(found, 90.0) == {"chained": {"0": found["chained"]["0"]}}
    assert ablation.at(found["chained"]["0"], 70.0) == pytest.approx(0.3)
    # 0 up to 40, then a line to 0.6 at 100: mean over [0, 100] is 60 * 0.3 / 100
    assert ablation.mean_up_to(found["chained"]["0"], 100.0) == pytest.approx(0.18, abs=1e-3)
    lines = list(ablation.table(found, 80.0))
    assert len(lines) == 5  # grpo has not come so far
    # at 40 tokens 0.0 and 0.2, at 80 0.4 and 0.4
    assert "| 2 | 0.10 (0.00 - 0.20) | 0.10 (0.00 - 0.20) | 0.40 (0.40 - 0.40) |" in lines[-1]


@pytest.mark.parametrize("variant", ablation.VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_composes(variant: ablation.Variant, tmp_path: Path) -> None:
    command = ablation.Cell(variant, 0, tmp_path).command([])
    load(command[command.index("recipe=ppo_coding") :])


def test_the_command_of_a_cell_is_the_recipe_and_what_differs(tmp_path: Path) -> None:
    cells = ablation.cells(tmp_path, 2, ["no_warmup"])
    assert [cell.seed for cell in cells] == [0, 1]
    command = cells[1].command(["cluster.min_memory_gb=0"])
    assert command.index("steps=41") > command.index("steps=35")  # what the variant needs comes later, and wins
    assert {"seed=1", "critic.warmup_episodes=0", "cluster.min_memory_gb=0"} <= set(command)
    assert not cells[0].finished
