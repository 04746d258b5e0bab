"""The demo's targets, computed from a run's metrics."""

from __future__ import annotations

import pytest

from benchmarks import demo


def rows(rates: list[float], explained: float = 0.3) -> list[dict[str, float]]:
    """An evaluation before the first step and one after every step; the critic is good only at the end."""
    found: list[dict[str, float]] = [
        {"step": 0, "time_s": 60.0, "rollout/tokens_generated": 1e3, "eval/pass_rate": 0.1}
    ]
    for step, rate in enumerate(rates, start=1):
        late = step > len(rates) - demo.LAST_STEPS
        row = {"critic/explained_variance": explained if late else -1.0, "eval/pass_rate": rate}
        found.append({"step": step, "time_s": 60.0 + step, "rollout/tokens_generated": 10.0, **row})
    return found


@pytest.mark.parametrize(
    ("rates", "explained", "holds"),
    [
        ([0.3, 0.5, 0.7, 0.8, 0.9, 0.89], 0.26, True),
        ([0.3, 0.5, 0.7, 0.8, 0.9, 0.86], 0.26, False),  # 0.04 below its best
        ([0.3, 0.5, 0.7, 0.8, 0.83, 0.84], 0.26, False),  # below 0.85
        ([0.3, 0.5, 0.7, 0.8, 0.9, 0.9], 0.24, False),  # a critic that explains too little
    ],
)
def test_what_is_promised_of_a_run(rates: list[float], explained: float, holds: bool) -> None:
    outcome = demo.Outcome.of(rows(rates, explained))
    assert outcome.explained_variance == pytest.approx(explained)
    assert outcome.num_tokens == 1060
    assert outcome.minutes == pytest.approx(1.1)
    assert outcome.holds is holds
    line = list(demo.table({3: outcome}))[-1]
    assert line.startswith(f"| 3 | 0.10 | {max(rates):.2f} | {rates[-1]:.2f} | {explained:.2f} | 1k | 1.1 |")
    assert "seed 3" in demo.draw({3: outcome})


def test_a_run_that_was_never_evaluated_is_refused() -> None:
    with pytest.raises(ValueError, match="0 evaluations"):
        demo.Outcome.of([{"step": 0, "time_s": 1.0}])
