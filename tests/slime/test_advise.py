"""`slime advise` on made-up runs: every verdict, its borders, and what it does not pretend to know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from slime import advise as module
from slime import cli
from slime.advise import MIN_STEPS, WINDOW, Advice, Figure, advise
from slime.config import load

SHORT: dict[str, Any] = {"compactions": 0.0, "straggler": 1.2}  # cheap, even episodes: nothing speaks for a critic
CRITIC = {"advantage": {"baseline": "critic"}, "buffer": {"episodes_per_step": 128, "episodes_per_prompt": 1}}
GROUPS = {"advantage": {"baseline": "grpo"}, "buffer": {"episodes_per_step": 128, "episodes_per_prompt": 8}}


def row(
    step: int,
    explained: float | None = None,
    zero_signal: float | None = None,
    compactions: float | None = 1.0,
    straggler: float | None = 1.5,
    reward: float = 0.5,
    reward_std: float | None = None,
) -> dict[str, float]:
    told = {
        "critic/explained_variance": explained,
        "advantage/zero_signal_groups": zero_signal,
        "rollout/compactions_per_episode": compactions,
        "rollout/straggler_ratio": straggler,
        "rollout/reward_std": math.sqrt(reward * (1 - reward)) if reward_std is None else reward_std,
    }
    fixed = {"step": step, "rollout/reward_mean": reward, "rollout/num_episodes": 128.0}
    more = {"rollout/tokens_generated": 128 * 300.0, "rollout/seconds_mean": 4.0, "rollout/seconds_p95": 6.0}
    return fixed | more | {name: number for name, number in told.items() if number is not None}


def rows(steps: int = 10, **numbers: Any) -> list[dict[str, float]]:
    """Return metrics of steps 1, 2, ... after an evaluation; a list has one number per step."""
    made = []
    for step in range(1, steps + 1):
        own = {name: n[step - 1] if isinstance(n, list) else n for name, n in numbers.items()}
        made.append(row(step, **own))
    return [{"step": 0, "eval/pass_rate": 0.1}, *made]


def figure(advice: Advice, name: str) -> Figure:
    return next(one for one in advice.figures if name in one.name)


# -- runs with a critic -----------------------------------------------------------------------------------------------


def test_a_critic_that_foretells_is_kept() -> None:
    advice = advise(rows(explained=0.4, **SHORT), CRITIC)
    assert advice.verdict == "keep the critic"
    assert advice.reasons == ("it explains 40 % of the return's variance",)
    assert advice.settings == ""
    assert figure(advice, "noise").value == pytest.approx(0.6)


def test_a_critic_that_foretells_nothing_on_short_even_episodes_is_left() -> None:
    advice = advise(rows(explained=0.01, **SHORT), CRITIC)
    assert advice.verdict == "switch to a group baseline"
    assert advice.reasons[0] == "the critic explains 1 % of the return's variance"
    assert advice.settings == "advantage.baseline=grpo buffer.episodes_per_prompt=8"


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"compactions": 0.8}, "0.8 compactions an episode"),
        ({"straggler": 2.5}, "slowest episode 2.5 times the mean"),
        ({"reward": 0.95}, ">= 66 % of groups would be without signal"),
    ],
)
def test_each_of_the_three_conditions_keeps_a_weak_critic(numbers: dict[str, float], reason: str) -> None:
    advice = advise(rows(explained=0.01, **{**SHORT, **numbers}), CRITIC)
    assert advice.verdict == "keep the critic"
    assert advice.reasons[0] == reason
    assert "but it explains 1 %" in advice.reasons[-1]


@pytest.mark.parametrize(
    ("name", "number"), [("explained", 0.05), ("compactions", module.COMPACTIONS), ("straggler", module.STRAGGLER)]
)
def test_on_the_border_a_critic_is_kept(name: str, number: float) -> None:
    border: dict[str, Any] = {"explained": 0.01, **SHORT}
    assert advise(rows(**border), CRITIC).verdict == "switch to a group baseline"
    assert advise(rows(**{**border, name: number}), CRITIC).verdict == "keep the critic"


def test_noise_over_the_steps_decides_nothing() -> None:
    quiet = [0.02, 0.0] * 5  # mean .01, standard error .0033: .01 + 2 * .0033 < .05
    loud = [0.31, -0.29] * 5  # the same mean, standard error .1
    assert advise(rows(explained=quiet, **SHORT), CRITIC).verdict == "switch to a group baseline"
    advice = advise(rows(explained=loud, **SHORT), CRITIC)
    assert advice.verdict == "keep the critic"
    assert figure(advice, "noise").value == pytest.approx(0.99)
    assert figure(advice, "noise").stderr == pytest.approx(0.3 * math.sqrt(10 / 9) / math.sqrt(10))


@pytest.mark.parametrize("missing", ["explained", "compactions", "straggler"])
def test_what_is_not_known_is_no_reason_to_switch(missing: str) -> None:
    advice = advise(rows(**{"explained": 0.01, **SHORT, missing: None}), CRITIC)
    assert advice.verdict == "keep the critic"
    assert "not known" in "\n".join(advice.lines())


def test_the_bound_is_that_of_equally_hard_prompts_and_no_more_than_the_truth() -> None:
    rates = [0.9, 0.5]
    advice = advise(rows(explained=0.3, reward=[0.9, 0.5] * 5), CRITIC)
    bound = figure(advice, "without signal")
    assert bound.value == pytest.approx(0.7**8 + 0.3**8)
    assert bound.text == ">= 5.8 %"
    assert bound.value is not None
    assert bound.value < sum(p**8 + (1 - p) ** 8 for p in rates) / 2  # prompts of these two kinds, in truth
    assert figure(advise(rows(explained=0.3, reward=1.0), CRITIC), "without signal").value == 1.0


def test_the_bound_weighs_steps_by_their_episodes() -> None:
    made = rows(steps=5, explained=0.3, reward=[1.0, 0.0, 0.0, 0.0, 0.0])
    made[1]["rollout/num_episodes"] = 4 * 128.0
    assert figure(advise(made, CRITIC), "without signal").value == pytest.approx(2 / 2**8)


@pytest.mark.parametrize("reward_std", [0.25, 0.0])
def test_rewards_that_are_not_0_or_1_have_no_bound(reward_std: float) -> None:
    bound = figure(advise(rows(explained=0.3, reward=0.5, reward_std=reward_std), CRITIC), "without signal")
    assert bound.value is None
    made = [{name: n for name, n in one.items() if name != "rollout/reward_std"} for one in rows(explained=0.3)]
    assert figure(advise(made, CRITIC), "without signal").text == "not known"


def test_a_kl_in_the_reward_has_no_bound() -> None:
    penalty = {"kl_coef": 0.01, "kl_in": "reward"}
    assert figure(advise(rows(explained=0.3), CRITIC | {"policy": penalty}), "without signal").value is None
    for other in ({**penalty, "kl_coef": 0.0}, {**penalty, "kl_in": "loss"}):
        assert figure(advise(rows(explained=0.3), CRITIC | {"policy": other}), "without signal").value is not None


# -- runs with groups -------------------------------------------------------------------------------------------------


def test_groups_without_signal_call_for_a_critic() -> None:
    advice = advise(rows(zero_signal=0.6, **SHORT), GROUPS)
    assert advice.verdict == "switch to a critic"
    assert advice.reasons == ("60 % of groups are without signal",)
    assert advice.settings == ("advantage.baseline=critic buffer.episodes_per_prompt=1 critic.warmup_episodes=1280")


def test_cut_episodes_call_for_a_critic() -> None:
    advice = advise(rows(zero_signal=0.1, compactions=1.9, straggler=2.5), GROUPS)
    assert advice.verdict == "switch to a critic"
    assert advice.reasons == (
        "1.9 compactions an episode, whose parts share one number",
        "slowest episode 2.5 times the mean",
    )


@pytest.mark.parametrize(
    "numbers",
    [
        {"zero_signal": 0.2},
        {"zero_signal": 0.5},  # borders
        {"zero_signal": 0.2, "compactions": 0.5},
        {"zero_signal": 0.2, "straggler": 9.0},  # time alone
        {"zero_signal": [0.9, 0.2] * 5},  # mean .55, standard error .117
        {"zero_signal": None},
    ],
)
def test_groups_are_kept_where_nothing_certain_speaks_against_them(numbers: dict[str, Any]) -> None:
    advice = advise(rows(**{**SHORT, **numbers}), GROUPS)
    assert advice.verdict == "keep the baseline grpo"
    assert advice.settings == ""


def test_a_baseline_without_groups_has_no_groups_without_signal() -> None:
    alone = {"advantage": {"baseline": "reinforce_pp"}, "buffer": {"episodes_per_step": 128}}
    advice = advise(rows(zero_signal=1.0, **SHORT), alone)  # a group of one has no signal by definition
    assert advice.verdict == "keep the baseline reinforce_pp"
    assert figure(advice, "without signal").value is None


# -- settings, refusals, the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffer",
    [[], ["buffer.slots=256", "buffer.window=128"], ["buffer.episodes_per_step=100"],
     ["buffer.episodes_per_step=96", "buffer.slots=150", "buffer.window=99"]],
)  # fmt: skip
def test_the_settings_compose_with_the_run_s_own(buffer: list[str]) -> None:
    before = load(["recipe=ppo_coding", *buffer]).config
    config = {
        "advantage": {"baseline": "critic", "whiten": before.advantage.whiten},
        "buffer": {name: getattr(before.buffer, name) for name in ("episodes_per_step", "slots", "window")},
    }
    advice = advise(rows(explained=0.0, **SHORT), config)
    after = load(["recipe=ppo_coding", *buffer, *advice.settings.split()]).config
    assert (after.advantage.baseline.value, after.buffer.episodes_per_prompt) == ("grpo", 8)
    assert not after.advantage.whiten
    config["buffer"] |= {"episodes_per_prompt": 8}
    back = advise(rows(zero_signal=0.9, **SHORT), config | {"advantage": {"baseline": "grpo"}})
    again = load(["recipe=ppo_coding", *buffer, *back.settings.split()]).config
    assert (again.advantage.baseline.value, again.buffer.episodes_per_prompt) == ("critic", 1)
    assert again.critic.warmup_episodes == 10 * before.buffer.episodes_per_step


def test_settings_that_need_a_critic_are_taken_back() -> None:
    own = {"baseline": "critic", "credit": "independent", "gamma": 0.9, "truncation": "bootstrap"}
    settings = advise(rows(explained=0.0, **SHORT), CRITIC | {"advantage": own}).settings
    before = [f"advantage.{key}={value}" for key, value in own.items()]
    after = load(["recipe=ppo_coding", *before, *settings.split()]).config.advantage
    assert (after.baseline.value, after.credit.value, after.gamma) == ("grpo", "chained", 1.0)


def test_a_critic_s_own_pre_training_is_left_as_it_is() -> None:
    advice = advise(rows(zero_signal=0.9), GROUPS | {"critic": {"warmup_episodes": 640}})
    assert "warmup" not in advice.settings


def test_only_the_last_steps_count() -> None:
    early = rows(steps=30, zero_signal=[0.9] * 10 + [0.1] * 20, **SHORT)
    advice = advise(early, GROUPS)
    assert figure(advice, "without signal").value == pytest.approx(0.1)
    assert advice.steps == (30 - WINDOW + 1, 30)


def test_few_steps_and_supervised_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=f"not enough steps: {MIN_STEPS - 1} of training"):
        advise(rows(steps=MIN_STEPS - 1, explained=0.3), CRITIC)  # the evaluation before them is no step
    assert advise(rows(steps=MIN_STEPS, explained=0.3), CRITIC).verdict == "keep the critic"
    with pytest.raises(ValueError, match="kind=sft: only runs of kind ppo"):
        advise([{"step": n} for n in range(9)], {"kind": "sft"})


def test_the_command_prints_the_verdict_first_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(GROUPS))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows(zero_signal=0.6)))
    assert cli.main(["advise", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("switch to a critic: 60 % of groups are without signal")
    assert "advantage.baseline=critic" in lines[2]
    header = next(line for line in lines if line.startswith("figure"))
    column = header.index("threshold")
    (told,) = [line for line in lines if line.startswith("groups without signal")]
    assert told[column:].startswith("50 %")
    assert told[header.index("value") :].startswith("60 %")


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> str:
        assert cli.main(["advise", str(tmp_path)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert "no config.yaml" in refused()
    (tmp_path / "config.yaml").write_text(json.dumps(CRITIC))
    assert "not enough steps: 0 of training" in refused()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows(steps=4, explained=0.1)))
    assert "not enough steps: 4 of training are in metrics.jsonl, 5 are needed" in refused()
