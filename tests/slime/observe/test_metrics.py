"""A step's metrics against numbers computed by hand, and their page in docs/."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tree import ROOT

from buffer.types import Batch, EpisodeStats, Status, SubTrace, SubTraceInfo, SubTraceKind, Targets
from critic.diagnostics import critic_metrics
from slime.observe.metrics import (
    advantage_metrics,
    correction_metrics,
    engine_metrics,
    reference_metrics,
    rollout_metrics,
    staleness_metrics,
)
from trainer.columns import TOKEN_KINDS

JUNK = 1e6  # stands where nothing may be read


def trace(
    mask: list[int], logprobs: list[float] | None = None, versions: list[int] | None = None, episode: str = "e"
) -> SubTrace:
    """`logprobs` and `versions` of the action tokens only."""
    action_mask = np.array(mask, bool)

    def placed(numbers: list[float] | list[int] | None, elsewhere: float, dtype: Any) -> Any:
        out = np.full(len(mask), elsewhere, dtype)
        out[action_mask] = numbers if numbers is not None else 0
        return out

    return SubTrace(
        tokens=np.zeros(len(mask), np.int32),
        action_mask=action_mask,
        logprobs=placed(logprobs, 0, np.float32),
        rewards=np.zeros(len(mask), np.float32),
        versions=placed(versions, -1, np.int32),
        stale_mask=np.zeros(len(mask), bool),
        summary_mask=np.zeros(len(mask), bool),
        episode_id=episode,
        position=0,
        successor=None,
        kind=SubTraceKind.FINAL,
        status=Status.FINISHED,
    )


def stats(reward: float, seconds: float, tokens: int, turns: int = 1, **other: Any) -> EpisodeStats:
    return EpisodeStats(reward, duration_s=seconds, num_sampled=tokens, num_turns=turns, **other)


def batch(episodes: list[EpisodeStats], sub_traces: int = 1) -> Batch:
    items = tuple(SubTraceInfo(None, "e", 10, 5, 0) for _ in range(sub_traces))
    return Batch(step=3, items=items, episodes=tuple(episodes))


def f32(*numbers: float) -> Any:
    return np.array(numbers, np.float32)


# -- engine against trainer -------------------------------------------------------------------------------------------


def test_engine_metrics_by_hand() -> None:
    log2 = math.log(2)
    traces = [trace([0, 1, 0, 1], [-1.0, -2.0], [4, 5]), trace([0, 1], [-1.0], [5])]
    # l = log 2, -log 2, 0: rho = 2, 1/2, 1
    old = {0: f32(JUNK, -1 + log2, JUNK, -2 - log2), 1: f32(JUNK, -1.0)}
    found = engine_metrics(traces, old, version=5)
    k3 = (2 - 1 - log2) + (0.5 - 1 + log2) + 0  # = 1/2
    assert found == pytest.approx(
        {
            "policy/engine_kl": k3 / 3,
            "policy/rho_min": 0.5,
            "policy/rho_max": 2.0,
            "policy/engine_logprob_diff_max": log2,  # of version 5 only: |-log 2| and 0
            "policy/engine_logprob_diff_mean": log2 / 2,
        },
        rel=1e-6,
    )
    assert k3 == pytest.approx(0.5)


def test_engine_kl_estimates_the_divergence_of_the_engine_from_the_trainer() -> None:
    mu, pi = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.2, 0.3])
    counts = (mu * 1000).round().astype(int)  # an exact sample of mu
    drawn = np.repeat(np.arange(3), counts)
    one = trace([0] + [1] * len(drawn), np.log(mu)[drawn].tolist(), [0] * len(drawn))
    found = engine_metrics([one], {0: np.concatenate([f32(JUNK), np.log(pi)[drawn]]).astype(np.float32)}, 0)
    assert found["policy/engine_kl"] == pytest.approx(float((mu * np.log(mu / pi)).sum()), rel=1e-4)
    assert found["policy/engine_kl"] != pytest.approx(float((pi * np.log(pi / mu)).sum()), rel=0.05)


def test_equal_log_probabilities_have_no_divergence_and_small_ones_do_not_cancel() -> None:
    one = trace([0, 1, 1], [-1.0, -2.0], [7, 7])
    equal = engine_metrics([one], {0: f32(0, -1, -2)}, 7)
    assert (equal["policy/engine_kl"], equal["policy/rho_min"], equal["policy/rho_max"]) == (0.0, 1.0, 1.0)
    step = 2.0**-20
    tiny = engine_metrics([one], {0: f32(0, -1 + step, -2 + step)}, 7)
    assert tiny["policy/engine_kl"] == pytest.approx(step**2 / 2, rel=1e-4)


def test_without_tokens_of_the_current_version_the_mean_difference_is_not_known() -> None:
    found = engine_metrics([trace([0, 1], [-1.0], [3])], {0: f32(JUNK, -2.0)}, version=4)
    assert found["policy/engine_logprob_diff_max"] == 0.0
    assert "policy/engine_logprob_diff_mean" not in found
    assert found["policy/rho_max"] == pytest.approx(math.exp(-1))


def test_a_ratio_without_a_finite_value_is_left_out() -> None:
    found = engine_metrics([trace([0, 1], [-900.0], [3])], {0: f32(JUNK, 0.0)}, version=4)
    assert "policy/engine_kl" not in found
    assert "policy/rho_max" not in found
    assert all(math.isfinite(number) for number in found.values())


@pytest.mark.parametrize(("engine", "trainer"), [(-math.inf, -1.0), (-1.0, math.nan)])
def test_log_probabilities_that_are_not_finite_are_refused(engine: float, trainer: float) -> None:
    traces = [trace([0, 1], [-1.0], [0], "good"), trace([0, 1, 1], [-1.0, engine], [0, 0], "bad")]
    whose = "the engine" if math.isinf(engine) else "the trainer"
    with pytest.raises(ValueError, match=f"episode bad, sub-trace 0: a log-probability of {whose} is"):
        engine_metrics(traces, {0: f32(0, -1), 1: f32(0, -1, trainer)}, 0)


# -- staleness --------------------------------------------------------------------------------------------------------


def test_staleness_by_hand() -> None:
    traces = [trace([0, 1, 1, 0, 1], None, [10, 9, 9]), trace([0, 1, 1, 1, 1, 1], None, [10, 3, 2, 1, 0])]
    found = staleness_metrics(traces, version=10)  # lags 0 1 1, 0 7 8 9 10
    assert found["weights/lag_max"] == 10
    assert found["weights/lag_mean"] == pytest.approx((1 + 1 + 7 + 8 + 9 + 10) / 8)
    shares = {name.removeprefix("weights/lag_share_"): n for name, n in found.items() if "share" in name}
    assert shares == {"0": 2 / 8, "1": 2 / 8, **dict.fromkeys("23456", 0.0), "7": 1 / 8, "8_up": 3 / 8}
    assert sum(shares.values()) == pytest.approx(1)


def test_stale_tokens_are_counted_and_raise_no_alarm() -> None:
    """Sampled at the trainer's version, but over older keys and values: the difference is no fault of the engine's."""
    one = trace([0, 1, 1, 0, 1], [-1.0, -2.0, -3.0], [4, 5, 5])
    stale = replace(one, stale_mask=np.array([False, False, True, False, False]))
    old = {0: f32(JUNK, -1, -2.5, JUNK, -3.125)}
    assert engine_metrics([one], old, 5)["policy/engine_logprob_diff_max"] == 0.5
    assert engine_metrics([stale], old, 5)["policy/engine_logprob_diff_max"] == 0.125
    assert staleness_metrics([one], 5)["weights/stale_fraction"] == 0
    assert staleness_metrics([stale], 5)["weights/stale_fraction"] == pytest.approx(1 / 3)


def test_a_token_from_the_future_is_refused() -> None:
    with pytest.raises(ValueError, match="weight version 6, the trainer has 5"):
        staleness_metrics([trace([0, 1, 1], None, [5, 6])], version=5)


# -- corrections, advantages ------------------------------------------------------------------------------------------


def test_correction_by_hand() -> None:
    traces = [trace([0, 1, 1]), trace([0, 1, 0, 1])]
    found = correction_metrics(traces, [f32(JUNK, 0.0, 2.0), f32(0, 1.5, 0, 0.5)])
    assert found == {"policy/correction_mean": 1.0, "policy/correction_masked": 0.25}


def test_advantages_by_hand() -> None:
    traces = [trace([0, 1, 1]), trace([0, 1, 0, 1])]
    told = [f32(JUNK, 1, -3), f32(JUNK, 2, JUNK, 0)]
    targets = [Targets(advantages=a, returns=np.zeros_like(a), values=np.zeros_like(a)) for a in told]
    found = advantage_metrics(traces, targets)  # mean 0, squares 1 9 4 0
    assert found == pytest.approx({"advantage/mean": 0, "advantage/std": math.sqrt(14 / 4), "advantage/abs_max": 3})


def test_arrays_of_another_length_and_steps_without_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="episode e, sub-trace 0: 2 numbers for 3 tokens"):
        correction_metrics([trace([0, 1, 1])], [f32(1, 1)])
    with pytest.raises(ValueError, match="hold no action token"):
        correction_metrics([trace([0, 0])], [f32(1, 1)])
    with pytest.raises(ValueError, match="hold no action token"):
        staleness_metrics([], 0)


# -- rollout ----------------------------------------------------------------------------------------------------------


def test_rollout_by_hand() -> None:
    episodes = [
        stats(1, seconds=2, tokens=10, num_compactions=2, compacted=True, turns=5, engine_s=1),
        stats(0, seconds=4, tokens=20, turns=3, truncated=True, engine_s=3),
        stats(0, seconds=12, tokens=30, turns=4, engine_s=5),
        stats(0, seconds=6, tokens=40, turns=4, engine_s=3),
    ]
    found = rollout_metrics(batch(episodes, sub_traces=6))
    assert found == pytest.approx(
        {
            "rollout/reward_mean": 0.25,
            "rollout/reward_std": math.sqrt(0.25 * 0.75),
            "rollout/num_episodes": 4,
            "rollout/num_without_turn": 0,
            "rollout/num_sub_traces": 6,
            "rollout/compactions_per_episode": 0.5,
            "rollout/compacted_fraction": 0.25,
            "rollout/turns_per_episode": 4,
            "rollout/truncated_fraction": 0.25,
            "rollout/tokens_generated": 100,
            "rollout/tokens_p95": 38.5,  # between 30 and 40, at 0.95 * 3 = 2.85
            "rollout/tokens_trained": 60,
            "rollout/seconds_mean": 6,
            "rollout/seconds_p95": 11.1,  # between 6 and 12
            "rollout/seconds_max": 12,
            "rollout/straggler_ratio": 2,
            "rollout/engine_time_fraction": 0.5,
        }
    )


def test_episodes_without_a_turn_are_in_no_mean() -> None:
    """Whatever was measured on them: the means are those of the others; without others there are none."""
    played = [stats(1, seconds=2, tokens=10), stats(0, seconds=4, tokens=20, truncated=True)]
    silent = [
        stats(1, seconds=90, tokens=0, turns=0, truncated=True, num_compactions=9, compacted=True, engine_s=80)
    ] * 3
    alone, among = rollout_metrics(batch(played)), rollout_metrics(batch([silent[0], *played, *silent[1:]]))
    assert (among.pop("rollout/num_episodes"), among.pop("rollout/num_without_turn")) == (5, 3)
    assert (alone.pop("rollout/num_episodes"), alone.pop("rollout/num_without_turn")) == (2, 0)
    assert among == alone
    assert rollout_metrics(batch(silent, sub_traces=0)) == {
        "rollout/num_episodes": 3,
        "rollout/num_without_turn": 3,
        "rollout/num_sub_traces": 0,
        "rollout/tokens_trained": 0,
    }


def test_kl_to_the_reference_by_hand() -> None:
    """d = .5 and -1: k3 = e^-.5 - .5 and e^1 - 2. A token that was not sampled counts for nothing."""
    one = trace([0, 1, 0, 1], [-1.0] * 2, [0, 0])
    old = np.array([9, -1.0, 9, -2.0], np.float32)
    reference = np.array([-9, -1.5, -9, -1.0], np.float32)
    found = reference_metrics([one], {0: old}, {0: reference})
    assert found == {"policy/reference_kl": pytest.approx((math.exp(-0.5) - 0.5 + math.e - 2) / 2)}
    assert reference_metrics([one], {0: old}, {}) == {}


def test_episodes_that_took_no_time_have_no_ratios() -> None:
    found = rollout_metrics(batch([stats(1, 0.0, 3)]))
    assert {"rollout/straggler_ratio", "rollout/engine_time_fraction"} & set(found) == set()
    assert found["rollout/seconds_max"] == 0
    with pytest.raises(ValueError, match="step 3: the batch has no episode"):
        rollout_metrics(batch([]))


# -- the page in docs/ ------------------------------------------------------------------------------------------------

# What the roles of training processes sum up, by the prefix under which the loop logs it; "tokens" divides, "gradient/"
# becomes shares.
ROLES = {
    "policy": {"trainer/policy.py", "trainer/group.py"},
    "critic": {"critic/worker.py", "trainer/group.py"},
}
POLICY = {
    "loss", "clip_fraction", "ratio_mean", "ratio_max", "kl", "entropy", "nll", "grad_norm", "lr",
    *(f"gradient_share/{part}" for part in TOKEN_KINDS),
}  # fmt: skip
CRITIC = {"loss", "clip_fraction", "grad_norm", "lr"}
NO_METRICS = {"tokens"}  # what divides them
PHASES = {"rollout", "values", "update", "publish", "eval", "step", "other"}
LITERAL = re.compile(r"\"((?:policy|critic|advantage|rollout|weights|eval|time|sft|recovery)/[a-z0-9_/]+)\"")


def told_by_workers(path: Path) -> Iterator[str]:
    """Names under which a worker's source puts numbers: keys of its dictionaries."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Dict):
            keys = list(node.keys)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = [node.slice]
        else:
            continue
        yield from (str(key.value) for key in keys if isinstance(key, ast.Constant))


def logged() -> set[str]:
    """Return every name that a run can log."""
    one = trace([0, *[1, 0] * 9], [-1.0] * 9, [0] * 9)  # nine turns
    zeros = np.zeros(len(one.tokens), np.float32)
    targets = [Targets(advantages=zeros, returns=zeros, values=zeros)]
    names = {
        *rollout_metrics(replace(batch([stats(1, 2, 3)]), tokens_per_s=1.0)),
        *staleness_metrics([one], 0),
        *engine_metrics([one], {0: one.logprobs}, 0),
        *correction_metrics([one], [zeros]),
        *reference_metrics([one], {0: one.logprobs}, {0: one.logprobs}),
        *advantage_metrics([one], targets),
        *critic_metrics([one], targets),
        *(f"policy/{name}" for name in POLICY),
        *(f"critic/{name}" for name in CRITIC),
        *(f"{role}/peak_memory_gb" for role in ("policy", "reference", "critic")),
        *(f"time/{name}_s" for name in PHASES),
    }
    for path in ("slime/loop.py", "slime/run.py", "slime/sft.py", "slime/recovery/recovery.py", "critic/estimators.py"):
        names |= set(LITERAL.findall((ROOT / path).read_text()))
    return names


def documented() -> list[str]:
    """Return the first column of the page's tables."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    cells = re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_the_roles_log_what_is_listed_here() -> None:
    for prefix, expected in (("policy", POLICY), ("critic", CRITIC)):
        found = {name for path in ROLES[prefix] for name in told_by_workers(ROOT / path)} - NO_METRICS
        assert found == {name for name in expected if "/" not in name}, prefix


def test_every_metric_is_on_the_page_once_and_nothing_else_is() -> None:
    names, patterns = logged(), documented()
    assert len(names) > 80
    lacking = {name: [p for p in patterns if fnmatchcase(name, p)] for name in names}
    assert {name for name, found in lacking.items() if len(found) != 1} == set()
    assert {p for p in patterns if not any(fnmatchcase(name, p) for name in names)} <= {"time_s"}


def test_the_page_names_metrics_that_exist() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text() + (ROOT / "docs" / "algorithms.md").read_text()
    mentioned = {name for name in re.findall(r"`([^`\s]+)`", page) if LITERAL.fullmatch(f'"{name}"')}
    assert mentioned - logged() == set()
