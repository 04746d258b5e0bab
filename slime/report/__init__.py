"""One self-contained page about a run, made from metrics.jsonl, episodes.jsonl and config.yaml alone.

    write_report(Path("runs/ppo_coding"))           # -> runs/ppo_coding/report.html
    write_curve(Path("runs/ppo_coding"), out)       # the held-out curve as an SVG file, for a README

The page fetches nothing: its content security policy allows only its own script, by hash, and inline styles.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from buffer.text import clean_text
from slime.observe.tracking import EPISODES_FILE, METRICS_FILE, read_metrics
from slime.observe.view import duration
from slime.report.charts import Chart, Series, figure, percent, short, standalone
from slime.report.curves import Rows, curves, pass_rate, points
from slime.report.episodes import choose, render, scale

__all__ = ["read_config", "write_curve", "write_report"]

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


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path. The page is complete or does not appear.

    ValueError when the run has no metrics yet. Curves whose metrics were never logged are left out.
    """
    rows = _rows(run_dir)
    config = read_config(run_dir)
    records = choose(run_dir / EPISODES_FILE)
    colors = scale(records)
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _fill(
        _resource("page.html"),
        {
            "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
            "title": escape(clean_text(str(config.get("run") or run_dir.resolve().name))),
            "style": _resource("page.css"),
            "facts": _facts(rows, config),
            "curves": curves(rows),
            "time": _time(rows),
            "episodes": render(records) or "<p>No sample episodes were kept.</p>",
            "controls": "" if records else "hidden",
            "advantage": short(colors.advantage),
            "value_low": short(colors.low),
            "value_high": short(colors.high),
            "script": script,
        },
    )
    out = run_dir / REPORT_FILE
    part = out.with_suffix(f".{os.getpid()}.part")  # a run that ends writes its own
    part.write_text(page, encoding="utf-8")
    part.replace(out)
    return out


def write_curve(run_dir: Path, out: Path) -> Path:
    """Write the held-out pass rate over training as a standalone SVG. ValueError when nothing was evaluated."""
    series = pass_rate(_rows(run_dir))
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


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the run's config.yaml as plain values; empty when there is none. ValueError: it is not YAML."""
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
    """Replace each {{name}} of the template in one pass, so that the contents of a value are never replaced."""
    first, *pieces = template.split("{{")
    parts = [first]
    for piece in pieces:
        name, rest = piece.split("}}", 1)
        parts += [values[name], rest]
    return "".join(parts)


def _total(rows: Rows, name: str) -> float:
    return math.fsum(row.get(name, 0.0) for row in rows)


def _facts(rows: Rows, config: Mapping[str, Any]) -> str:
    """Return the facts of the run as a definition list, without unknown ones."""
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
        ("engine options", _engine_options(config)),
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


def _engine_options(config: Mapping[str, Any]) -> str:
    """Return the options of SGLang and Megatron that the run sets in addition to our own settings."""
    found = {key: _inside(_inside(config.get(key), "engine"), "options") for key in ("rollout", "policy", "critic")}
    return ", ".join(
        f"{key}.engine.options.{name}={value}"
        for key, options in found.items()
        for name, value in (options or {}).items()
    )


def _model(section: Any) -> Any:
    return _inside(section, "name") or _inside(section, "path")


def _time(rows: Rows) -> str:
    """Return the time per step, stacked, and a sentence on the time outside engines and Megatron."""
    chart = Chart(
        "Time per step",
        [Series(name, points(rows, key), color) for color, (key, name) in enumerate(_TIME_PARTS)],
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
