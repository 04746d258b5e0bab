"""One self-contained page about a run, made from metrics.jsonl, episodes.jsonl and config.yaml alone.

    write_report(Path("runs/ppo_coding"))           # -> runs/ppo_coding/report.html
    write_curve(Path("runs/ppo_coding"), out)       # the held-out curve as an SVG file, for a README

The page fetches nothing: its content security policy allows only its own script, by hash, and inline styles.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from slime.observe.tracking import EPISODES_FILE, METRICS_FILE, clean_text, read_metrics
from slime.observe.view import duration
from slime.report.charts import Chart, Series, figure, percent, short, standalone
from slime.report.episodes import choose, render, scale

__all__ = ["write_curve", "write_report"]

REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"

_TIME_PARTS = (
    ("time/rollout_s", "rollout"),
    ("time/values_s", "critic values"),
    ("time/update_s", "updates"),
    ("time/publish_s", "publish weights"),
    ("time/eval_s", "evaluation"),
    ("time/other_s", "other"),
)
Rows = Sequence[Mapping[str, float]]
_LOG = "log"  # instead of a number format: a logarithmic axis
# title, (metric, label, colour) of each series, note, number format
_CURVES: tuple[tuple[str, tuple[tuple[str, str, int], ...], str, Callable[[float], str] | str], ...] = (
    (
        "Critic: explained variance",
        (("critic/explained_variance", "explained variance", 2),),
        "1: returns foretold; 0: no better than their mean.",
        short,
    ),
    (
        "Clipped tokens",
        (("policy/clip_fraction", "clip fraction", 3),),
        "Share whose probability ratio left the trust region.",
        percent,
    ),
    (
        "Engine against trainer",
        (("policy/engine_logprob_diff_max", "log-prob difference", 4),),
        "Largest log-prob difference on the same tokens.",
        _LOG,
    ),
    ("Entropy", (("policy/entropy", "entropy", 5),), "Mean per action token, in nats.", short),
    ("Policy loss", (("policy/loss", "policy loss", 0),), "", short),
    ("Critic loss", (("critic/loss", "critic loss", 2),), "", short),
    (
        "Gradient norm",
        (("policy/grad_norm", "policy", 0), ("critic/grad_norm", "critic", 2)),
        "Before clipping.",
        short,
    ),
    (
        "Episodes and sub-traces",
        (("rollout/num_episodes", "episodes", 0), ("rollout/num_sub_traces", "sub-traces", 1)),
        "Trained in each step.",
        short,
    ),
    ("Compactions", (("rollout/compactions_per_episode", "compactions", 4),), "Per episode.", short),
    (
        "Truncated episodes",
        (("rollout/truncated_fraction", "truncated", 1),),
        "Share that ran out of a budget.",
        percent,
    ),
    ("Lag", (("weights/lag_max", "lag", 5),), "Most weight versions between sampling and training.", short),
)


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html and returns its path; the page appears whole or not at all.

    ValueError when the run has no metrics yet. Curves whose metrics were never logged are left out.
    """
    rows = _rows(run_dir)
    config = _config(run_dir)
    records = choose(run_dir / EPISODES_FILE)
    colours = scale(records)
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _fill(
        _resource("page.html"),
        {
            "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
            "title": escape(clean_text(str(config.get("run") or run_dir.resolve().name))),
            "style": _resource("page.css"),
            "facts": _facts(rows, config),
            "curves": _curves(rows),
            "time": _time(rows),
            "episodes": render(records) or "<p>No sample episodes were kept.</p>",
            "controls": "" if records else "hidden",
            "advantage": short(colours.advantage),
            "value_low": short(colours.low),
            "value_high": short(colours.high),
            "script": script,
        },
    )
    out = run_dir / REPORT_FILE
    part = out.with_suffix(".part")
    part.write_text(page, encoding="utf-8")
    part.replace(out)
    return out


def write_curve(run_dir: Path, out: Path) -> Path:
    """Writes the held-out pass rate over training as a standalone SVG. ValueError when nothing was evaluated."""
    series = _pass_rate(_rows(run_dir))
    if not series.points:
        raise ValueError(f"{run_dir / METRICS_FILE}: no step has eval/pass_rate: set eval.every and run again")
    out.parent.mkdir(parents=True, exist_ok=True)
    chart = Chart("Held-out pass rate, with one standard error", [series], bounds=(0.0, 1.0), form=percent)
    out.write_text(standalone(chart), encoding="utf-8")
    return out


def _rows(run_dir: Path) -> list[dict[str, float]]:
    rows = read_metrics(run_dir)
    if not rows:
        raise ValueError(
            f"{run_dir / METRICS_FILE}: no metrics yet: is {run_dir} the folder of a run that has started?"
        )
    return rows


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    return found if isinstance(found, dict) else {}


def _resource(name: str) -> str:
    return (files("slime.report") / name).read_text(encoding="utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Puts values where the template says {{name}}, in one pass: what a value contains is never filled again."""
    first, *pieces = template.split("{{")
    parts = [first]
    for piece in pieces:
        name, rest = piece.split("}}", 1)
        parts += [values[name], rest]
    return "".join(parts)


def _points(
    rows: Rows, name: str, scale_by: Callable[[float], float] = lambda value: value
) -> list[tuple[float, float]]:
    return [(row["step"], scale_by(row[name])) for row in rows if name in row]


def _pass_rate(rows: Rows) -> Series:
    evals = [row for row in rows if "eval/pass_rate" in row]
    errors = [row.get("eval/pass_rate_stderr", 0.0) for row in evals]
    return Series(
        "held-out pass rate",
        _points(evals, "eval/pass_rate"),
        colour=0,
        errors=errors if any(errors) else (),
        dots=len(evals) <= 60,
    )


def _total(rows: Rows, name: str) -> float:
    return math.fsum(row.get(name, 0.0) for row in rows)


def _facts(rows: Rows, config: Mapping[str, Any]) -> str:
    """Run facts as a definition list; what is not known is left out."""
    last = rows[-1]
    evals = [row for row in rows if "eval/pass_rate" in row]
    facts: list[tuple[str, str, str]] = []
    if evals:
        final = evals[-1]
        spread = f"± {percent(final['eval/pass_rate_stderr'])}, " if "eval/pass_rate_stderr" in final else ""
        tasks = f"{final['eval/num_tasks']:.0f} tasks, " if "eval/num_tasks" in final else ""
        facts.append(
            ("final held-out pass rate", percent(final["eval/pass_rate"]), f"{spread}{tasks}step {final['step']:.0f}")
        )
        best = max(evals, key=lambda row: row["eval/pass_rate"])
        facts.append(("best held-out pass rate", percent(best["eval/pass_rate"]), f"step {best['step']:.0f}"))
        if evals[0] is not final:
            facts.append(("at the start", percent(evals[0]["eval/pass_rate"]), f"step {evals[0]['step']:.0f}"))
    wanted = config.get("steps")
    facts.append(("steps", f"{last['step']:.0f}", f"of {wanted}" if wanted else ""))
    wall_s = last.get("time_s") or _total(rows, "time/step_s")
    if wall_s:
        facts.append(("wall time", duration(wall_s), ""))
    for label, value in (
        ("recipe", config.get("recipe")),
        ("model", _model(config.get("model"))),
        ("task", _inside(config.get("task"), "target")),
    ):
        if value:
            facts.append((label, clean_text(str(value)), ""))
    return "".join(
        f'<div class="{"big" if number[:1].isdigit() else "fact"}"><dt>{escape(label)}</dt>'
        f"<dd>{escape(number)}<small>{escape(note)}</small></dd></div>"
        for label, number, note in facts
    )


def _inside(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, dict) else None


def _model(section: Any) -> Any:
    return _inside(section, "name") or _inside(section, "path")


def _smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Mean of each point and the `window` - 1 before it."""
    means = []
    for index, (step, _) in enumerate(points):
        recent = points[max(0, index - window + 1) : index + 1]
        means.append((step, sum(value for _, value in recent) / len(recent)))
    return means


def _curves(rows: Rows) -> str:
    reward = _points(rows, "rollout/reward_mean")
    window = max(5, len(reward) // 40)
    learned: list[Series] = [_pass_rate(rows)]
    if len(reward) > window:
        learned.append(Series("training reward", reward, colour=1, faint=True))
        learned.append(Series(f"training reward, mean of {window} steps", _smooth(reward, window), colour=1))
    else:
        learned.append(Series("training reward", reward, colour=1))
    inside = all(0.0 <= value <= 1.0 for _, value in reward)
    first = Chart(
        "What was learned",
        learned,
        note="Pass rate on tasks that are never trained on, with one standard error; reward of training episodes.",
        bounds=(0.0, 1.0) if inside else None,
    )
    return figure(first, wide=True) + "".join(figure(chart) for chart in _small_charts(rows))


def _small_charts(rows: Rows) -> list[Chart]:
    charts = []
    for title, metrics, note, form in _CURVES:
        series = [
            Series(label, [point for point in _points(rows, name) if point[1] > 0 or form is not _LOG], colour)
            for name, label, colour in metrics
        ]
        charts.append(Chart(title, series, note, log=form is _LOG, form=short if isinstance(form, str) else form))
    speed = Series("tokens/s", _tokens_per_s(rows), 2)
    charts.append(Chart("Sampled tokens per second", [speed], "Of rollout time, all engines."))
    return charts


def _tokens_per_s(rows: Rows) -> list[tuple[float, float]]:
    return [
        (row["step"], row["rollout/tokens_generated"] / row["time/rollout_s"])
        for row in rows
        if row.get("time/rollout_s", 0.0) > 0 and "rollout/tokens_generated" in row
    ]


def _time(rows: Rows) -> str:
    """Time per step, stacked, and one sentence on what is spent outside engines and Megatron."""
    chart = Chart(
        "Time per step",
        [Series(name, _points(rows, key), colour) for colour, (key, name) in enumerate(_TIME_PARTS)],
        note="Seconds, stacked.",
        form=lambda value: f"{short(value)} s",
        stacked=True,
    )
    total_s, other_s, publish_s = (_total(rows, f"time/{name}_s") for name in ("step", "other", "publish"))
    if total_s <= 0:
        return figure(chart, wide=True) or "<p>No step was timed.</p>"
    agent_s = sum(
        row["time/rollout_s"] * (1.0 - row["rollout/engine_time_fraction"])
        for row in rows
        if "time/rollout_s" in row and "rollout/engine_time_fraction" in row
    )
    outside_s = other_s + agent_s
    share, publish = 100 * outside_s / total_s, 100 * publish_s / total_s
    return (
        f'<p class="lead"><b>{share:.1f} %</b> of the steps\' wall time ({duration(outside_s)} of '
        f"{duration(total_s)}) was spent outside engines and Megatron: {duration(agent_s)} in the agent loop, its "
        "tools and sandboxes (the part of time/rollout_s in which an episode did not wait for an engine) and "
        f"{duration(other_s)} in the buffer, advantages, packing and moving data (time/other_s). "
        "Publishing weights to the engines "
        f"is not in it and took another {publish:.1f} % ({duration(publish_s)}).</p>" + figure(chart, wide=True)
    )
