"""Ablation of the algorithm's components at the demo's scale: whole runs of `slime train`, several seeds each.

    .venv/bin/python benchmarks/ablation.py run --seeds 3 --jobs 2 [-- key=value ...]
    .venv/bin/python benchmarks/ablation.py table                      prints the table, draws the curves

`run` starts the runs that are not finished yet and may be stopped at any time: a stopped run continues from its newest
checkpoint. All output is in runs/ablation/seed_<n>/. A job needs about 2 cores and 5 GB, and ten minutes on such cores.
The runs of one seed start from the same warm start, whose policy passes about a tenth of the held-out tasks.

The comparison is of held-out pass rates at equal numbers of generated tokens, including value pre-training. So a
variant without pre-training gets as many extra steps as the episodes of pre-training would have filled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slime.observe.tracking import read_metrics
from slime.report.charts import Chart, Series, percent, standalone

ROOT = Path(__file__).resolve().parent.parent
STEPS = 35
WARMUP_STEPS = 6  # steps' worth of episodes that value pre-training generates: 640 trained on, 128 to measure on
STAGGER_S = 4.0  # between two starts: Ray's start-up is the heaviest phase of a run
RESULTS = ROOT / "benchmarks" / "ablation.json"
CURVES = ROOT / "benchmarks" / "ablation.svg"
AS_MANY_EPISODES = f"steps={STEPS + WARMUP_STEPS}"  # override of a run without value pre-training


@dataclass(frozen=True)
class Variant:
    """One row of the table: the overrides of the recipe `ppo_coding`."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()


VARIANTS = (
    Variant("chained", "PPO, chained credit"),
    Variant("discounted", "PPO, discounted credit", ("advantage.credit=discounted",)),
    Variant("independent", "PPO, independent credit", ("advantage.credit=independent",)),
    Variant("no_summaries", "PPO, summaries not trained", ("policy.train_summaries=false",)),
    Variant("sub_trace_mean", "PPO, mean loss per sub-trace", ("policy.loss_norm=sub_trace",)),
    Variant("no_warmup", "PPO, no value pre-training", ("critic.warmup_episodes=0", AS_MANY_EPISODES)),
    Variant(
        "grpo",
        "GRPO, 8 episodes a prompt",
        ("advantage.baseline=grpo", "buffer.episodes_per_prompt=8", "advantage.whiten=false", AS_MANY_EPISODES),
    ),
)


@dataclass(frozen=True)
class Cell:
    """One run: a variant and a seed."""

    variant: Variant
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def run_dir(self) -> Path:
        return self.folder / f"seed_{self.seed}" / self.variant.name

    @property
    def finished(self) -> bool:
        return (self.run_dir / "model").is_dir()

    def command(self, extra: Sequence[str]) -> list[str]:
        """Return the command that starts or continues the run."""
        own = [f"run={self.variant.name}", f"runs_dir={self.run_dir.parent}", f"seed={self.seed}", f"steps={STEPS}"]
        shared = ["tracking.wandb=false", "checkpoint.keep=1"]
        train = [sys.executable, "-m", "slime.cli", "train", "recipe=ppo_coding"]
        return [*train, *own, *shared, *self.variant.overrides, *extra]


def cells(folder: Path, num_seeds: int, names: Sequence[str] = ()) -> list[Cell]:
    """Return all runs, seed by seed, so that the table of the first seeds is complete as early as possible."""
    chosen = [variant for variant in VARIANTS if not names or variant.name in names]
    return [Cell(variant, seed, folder) for seed in range(num_seeds) for variant in chosen]


def run_all(todo: Sequence[Cell], jobs: int, extra: Sequence[str]) -> bool:
    """Run cells, `jobs` at a time; return whether all of them finished. Their output goes to <run>.log.

    The first run of a seed makes the warm start that the others share, so the others wait for it.
    """
    waiting, running = list(todo), list[tuple[Cell, subprocess.Popen[bytes]]]()
    failed: list[str] = []
    warm: set[int] = set()
    while waiting or running:
        for cell, process in list(running):
            if (cell.run_dir / "metrics.jsonl").exists():
                warm.add(cell.seed)
            if process.poll() is None:
                continue
            running.remove((cell, process))
            print(f"{cell}: exit {process.returncode}", flush=True)
            if process.returncode:
                failed.append(str(cell))
        starting = {cell.seed for cell, _ in running} - warm
        ready = [cell for cell in waiting if cell.seed not in starting]
        if ready and len(running) < jobs:
            cell = ready[0]
            waiting.remove(cell)
            cell.run_dir.parent.mkdir(parents=True, exist_ok=True)
            log = cell.run_dir.with_suffix(".log").open("ab")
            running.append((cell, subprocess.Popen(cell.command(extra), cwd=ROOT, stdout=log, stderr=log)))
            print(f"{cell}: started", flush=True)
            time.sleep(STAGGER_S)
        time.sleep(1.0)
    if failed:
        print(f"not finished: {', '.join(failed)}; see their .log files", file=sys.stderr)
    return not failed


def curve(rows: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """Return (tokens generated so far, held-out pass rate) at every evaluation."""
    tokens, points = 0.0, []
    for row in rows:
        tokens += row.get("rollout/tokens_generated", 0.0)
        if "eval/pass_rate" in row:
            points.append((tokens, row["eval/pass_rate"]))
    return points


Curves = dict[str, dict[str, list[tuple[float, float]]]]  # variant -> seed -> curve


def collect(folder: Path, num_seeds: int) -> Curves:
    """Return the curves of all runs, finished or not, that have at least two evaluations."""
    found: Curves = {}
    for cell in cells(folder, num_seeds):
        points = curve(read_metrics(cell.run_dir))
        if len(points) > 1:
            found.setdefault(cell.variant.name, {})[str(cell.seed)] = points
    return found


def reaching(found: Curves, tokens: float) -> Curves:
    """Return the curves of the runs that have generated at least `tokens`."""
    kept = {
        name: {seed: points for seed, points in seeds.items() if points[-1][0] >= tokens}
        for name, seeds in found.items()
    }
    return {name: seeds for name, seeds in kept.items() if seeds}


def at(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """Return the pass rate after `tokens` generated tokens, linear between evaluations."""
    xs, ys = zip(*points, strict=True)
    return float(np.interp(tokens, xs, ys))


def mean_up_to(points: Sequence[tuple[float, float]], tokens: float, samples: int = 200) -> float:
    """Return the mean pass rate between 0 and `tokens`, which is higher the earlier the policy learns."""
    return float(np.mean([at(points, tokens * (k + 0.5) / samples) for k in range(samples)]))


def table(found: Curves, tokens: float) -> Iterator[str]:
    """Yield the lines of a Markdown table: mean and range over the seeds that have reached `tokens`."""
    yield f"Held-out pass rate by generated tokens, up to {tokens / 1e3:.0f}k; mean (lowest - highest seed)."
    yield ""
    yield "| variant | seeds | start | at half of the tokens | at all of them | mean on the way |"
    yield "|---|---|---|---|---|---|"
    for variant in VARIANTS:
        seeds = list(reaching(found, tokens).get(variant.name, {}).values())
        if not seeds:
            continue
        columns = (
            [points[0][1] for points in seeds],
            [at(points, tokens / 2) for points in seeds],
            [at(points, tokens) for points in seeds],
            [mean_up_to(points, tokens) for points in seeds],
        )
        shown = " | ".join(f"{np.mean(c):.2f} ({min(c):.2f} - {max(c):.2f})" for c in columns)
        yield f"| {variant.title} | {len(seeds)} | {shown} |"


def draw(found: Curves, tokens: float) -> str:
    """Return an SVG chart of the mean pass rate over seeds by thousands of generated tokens."""
    kept, grid = reaching(found, tokens), np.linspace(0, tokens, 40)
    series = [
        Series(
            variant.title,
            [(float(x) / 1e3, float(np.mean([at(points, float(x)) for points in seeds.values()]))) for x in grid],
            color,
        )
        for color, variant in enumerate(VARIANTS)
        if (seeds := kept.get(variant.name))
    ]
    title = "Held-out pass rate by thousands of generated tokens, mean over seeds"
    return standalone(Chart(title, series, bounds=(0.0, 1.0), form=percent, x_name="k"))


def main(arguments: Sequence[str]) -> int:
    own, extra = _split(list(arguments))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--variants", nargs="*", default=[], choices=[variant.name for variant in VARIANTS])
    parser.add_argument(
        "--tokens", type=float, default=0.0, help="budget to compare at; 0: the most that every run has reached"
    )
    options = parser.parse_args(own)
    if options.action == "run":
        todo = [cell for cell in cells(options.folder, options.seeds, options.variants) if not cell.finished]
        return 0 if run_all(todo, options.jobs, extra) else 1
    found = collect(options.folder, options.seeds)
    if not found:
        print(f"{options.folder}: no run has been evaluated twice: start them with `run`", file=sys.stderr)
        return 2
    tokens = options.tokens or min(points[-1][0] for seeds in found.values() for points in seeds.values())
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    CURVES.write_text(draw(found, tokens))
    print("\n".join(table(found, tokens)))
    return 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
