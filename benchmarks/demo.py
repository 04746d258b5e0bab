"""Results of the demo: whole runs of `make demo`'s recipe with several seeds, checked against what the demo promises.

    .venv/bin/python benchmarks/demo.py run --seeds 3 [-- key=value ...]
    .venv/bin/python benchmarks/demo.py table                          prints the table, draws docs/demo_curve.svg

`run` starts the runs that are not finished yet, one after the other, and may be stopped at any time. All output is in
runs/demo/. A run needs 2 otherwise idle cores; the first run of a seed also makes its warm start.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slime.observe.tracking import read_metrics
from slime.report.charts import Chart, Series, percent, standalone

ROOT = Path(__file__).resolve().parent.parent
CURVE = ROOT / "docs" / "demo_curve.svg"
MIN_PASS_RATE = 0.85  # of the last evaluation
MAX_FALL = 0.03  # of the last evaluation below the best one
MIN_EXPLAINED = 0.25  # explained variance, mean of the last steps
LAST_STEPS = 5

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Outcome:
    """A finished run in numbers."""

    pass_rates: tuple[tuple[float, float], ...]  # (step, held-out pass rate)
    explained_variance: float  # of the critic on unseen episodes, mean of the last `LAST_STEPS` steps
    num_tokens: float  # sampled for training and value pre-training
    minutes: float  # from the start of the run to its last step, without the warm start

    @staticmethod
    def of(rows: Rows) -> Outcome:
        """Read a run's metrics. ValueError: it was never evaluated, or has no critic."""
        rates = tuple((row["step"], row["eval/pass_rate"]) for row in rows if "eval/pass_rate" in row)
        explained = [row["critic/explained_variance"] for row in rows if "critic/explained_variance" in row]
        if not rates or not explained:
            raise ValueError(f"{len(rates)} evaluations and {len(explained)} explained variances: the run is not one")
        return Outcome(
            rates,
            float(np.mean(explained[-LAST_STEPS:])),
            sum(row.get("rollout/tokens_generated", 0.0) for row in rows),
            rows[-1]["time_s"] / 60,
        )

    @property
    def last(self) -> float:
        return self.pass_rates[-1][1]

    @property
    def best(self) -> float:
        return max(rate for _, rate in self.pass_rates)

    @property
    def holds(self) -> bool:
        """Return whether the run meets the promises of the demo."""
        ends_well = self.last >= MIN_PASS_RATE and self.last >= self.best - MAX_FALL
        return ends_well and self.explained_variance >= MIN_EXPLAINED


def table(outcomes: Mapping[int, Outcome]) -> Iterator[str]:
    """Yield the lines of a Markdown table with one row per run."""
    yield "| seed | start | best | last | explained variance, last 5 steps | tokens | minutes | as promised |"
    yield "|---|---|---|---|---|---|---|---|"
    for seed, run in outcomes.items():
        numbers = f"{run.pass_rates[0][1]:.2f} | {run.best:.2f} | {run.last:.2f} | {run.explained_variance:.2f}"
        promised = "yes" if run.holds else "no"
        yield f"| {seed} | {numbers} | {run.num_tokens / 1e3:.0f}k | {run.minutes:.1f} | {promised} |"


def draw(outcomes: Mapping[int, Outcome]) -> str:
    """Return an SVG chart of the held-out pass rate of every seed by step."""
    series = [Series(f"seed {seed}", run.pass_rates, seed, dots=True) for seed, run in outcomes.items()]
    return standalone(Chart("Held-out pass rate", series, bounds=(0.0, 1.0), form=percent))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, after --")
    options = parser.parse_intermixed_args(arguments)
    runs = {seed: options.folder / f"seed_{seed}" for seed in range(options.seeds)}
    if options.action == "run":
        for seed, run_dir in runs.items():
            own = [f"run={run_dir.name}", f"runs_dir={run_dir.parent}", f"seed={seed}", "tracking.wandb=false"]
            command = [sys.executable, "-m", "slime.cli", "train", "recipe=ppo_coding", *own, *options.overrides]
            subprocess.run(command, cwd=ROOT, check=True)
        return 0
    outcomes = {seed: Outcome.of(read_metrics(run_dir)) for seed, run_dir in runs.items() if run_dir.is_dir()}
    if not outcomes:
        print(f"{options.folder}: there is no run in it: start them with `run`", file=sys.stderr)
        return 2
    CURVE.write_text(draw(outcomes))
    print("\n".join(table(outcomes)))
    return 0 if all(run.holds for run in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
