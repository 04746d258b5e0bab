"""The report of a made-up run: complete, escaped, self-contained, bounded in size, and robust to missing metrics."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from slime.report import write_curve, write_report
from slime.report.charts import MAX_POINTS, Chart, Series, svg, thin, ticks
from slime.report.curves import CRITIC, DIVERGENCE, EPISODES, UPDATE, Curve, Panel, by_place, chart, curves, lag_shares
from slime.report.episodes import MAX_EPISODES, choose

VOID = {"meta", "br", "img", "line", "hr", "input", "link"}


def tokens(text: str, rng: random.Random, reward: float, summary: bool = False) -> list[dict[str, Any]]:
    """Make one token per character; characters in [ ] are sampled."""
    out: list[dict[str, Any]] = []
    action = False
    for char in text:
        if char in "[]":
            action = char == "["
            continue
        value = min(0.98, max(0.02, 0.5 + 0.35 * (reward - 0.5) + rng.gauss(0, 0.12)))
        out.append(
            {
                "text": char,
                "action": action,
                "summary": action and summary,
                "logprob": -abs(rng.gauss(0, 0.3)) if action else None,
                "value": value if action else None,
                "advantage": (reward - value) * rng.random() if action else None,
                "version": 3 if action else None,
            }
        )
    return out


def episode(name: str, reward: float, rng: random.Random) -> dict[str, Any]:
    task = "<u>f=lambda x:a*x*x?b*x-c+d;a8b9c6d2"
    parts = [
        tokens(task + "[$cat a8$]<t>e=12;a=17;k=4[$cat b9$]<t>b=12;q=3[$compact$]", rng, reward),
        tokens("<c>[a=17;b=12$]", rng, reward, summary=True),
        tokens(task + "<c>a=17;b=12$[$cat c6$]<t>c=5;z=1[$cat d2$]<t>d=9", rng, reward),
        tokens("<c>[a=17;b=12;c=5;d=9$]", rng, reward, summary=True),
        tokens(task + "<c>a=17;b=12;c=5;d=9$[$put f=lambda x:17*x*x-12*x-5+9$]<t>ok[$submit$]", rng, reward),
    ]
    return {
        "episode_id": name,
        "row": rng.randrange(100),
        "prompt": "f=lambda x:a*x*x?b*x-c+d;a8b9c6d2",
        "reward": reward,
        "status": "finished" if rng.random() < 0.9 else "truncated",
        "sub_traces": [
            {"kind": "compacted", "tokens": parts[0] + parts[1]},
            {"kind": "compacted", "tokens": parts[2] + parts[3]},
            {"kind": "final", "tokens": parts[4]},
        ],
        "guard_events": ["run: network refused"] if rng.random() < 0.1 else [],
    }


def step_metrics(step: int, steps: int, rng: random.Random) -> dict[str, float]:
    learned = 0.08 + 0.75 / (1 + math.exp(-8 * (step / steps - 0.5)))
    parts = {"rollout": 16.0, "values": 3.0, "update": 14.0, "publish": 0.7, "other": 0.9}
    times = {f"time/{name}_s": seconds * rng.uniform(0.85, 1.2) for name, seconds in parts.items()} if step else {}
    row: dict[str, float] = {"step": step, "time_s": step * 38.0}
    if step % max(1, steps // 9) == 0 or step == steps:
        row |= {"eval/pass_rate": learned, "eval/num_tasks": 128, "eval/pass_rate_stderr": 0.04}
        times["time/eval_s"] = 6.0
    row |= times
    if not step:
        return row
    return row | {
        "time/step_s": sum(times.values()),
        "rollout/reward_mean": min(1.0, max(0.0, learned + rng.gauss(0, 0.06))),
        "rollout/num_episodes": 64,
        "rollout/num_sub_traces": 150 + rng.randrange(20),
        "rollout/compactions_per_episode": 1.5 + rng.random(),
        "rollout/tokens_generated": 24_000 + rng.randrange(4000),
        "rollout/tokens_per_s": 900.0 + rng.randrange(100),
        "rollout/truncated_fraction": 0.1 * rng.random(),
        "policy/loss": rng.gauss(0, 0.01),
        "policy/clip_fraction": 0.02 * rng.random(),
        "policy/entropy": 1.2 - 0.8 * step / steps,
        "policy/grad_norm": 0.5 + rng.random(),
        "policy/engine_logprob_diff_max": 10 ** rng.uniform(-5.5, -4),
        "policy/gradient_share/final": 0.7,
        "policy/gradient_share/compacted": 0.3,
        "policy/gradient_share/sub_agent": 0.0,
        "policy/correction_masked": 0.0,
        "weights/lag_share_0": 0.75,
        "weights/lag_share_1": 0.25,
        "critic/loss": 0.2 / step,
        "critic/explained_variance": 0.8 * (1 - math.exp(-step / steps * 4)) + rng.gauss(0, 0.04) - 0.05,
        "weights/version": step,
        "weights/lag_max": rng.randrange(2),
    }


def write_run(run_dir: Path, steps: int = 45, episodes_per_sample: int = 4, seed: int = 0) -> Path:
    rng = random.Random(seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = [step_metrics(step, steps, rng) for step in range(steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (run_dir / "episodes.jsonl").open("w") as out:
        for row in rows:
            if row["step"] % max(1, steps // 9):
                continue
            for split in ("train", "eval") if row["step"] else ("eval",):
                for number in range(episodes_per_sample):
                    reward = float(rng.random() < row.get("rollout/reward_mean", 0.1))
                    record = episode(f"{split}-{row['step']}-{number}", reward, rng)
                    out.write(json.dumps({"step": row["step"], "split": split, **record}) + "\n")
    model, task = {"name": "tiny-qwen3"}, {"target": "recipes.coding:CodingTask"}
    config = {"recipe": "ppo_coding", "run": "ppo_coding", "steps": steps, "model": model, "task": task}
    (run_dir / "config.yaml").write_text(json.dumps(config))
    return run_dir


class Page(HTMLParser):
    """Checks that tags are nested correctly, and collects text, attributes and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "ppo_coding")


def test_page_holds_every_section(run_dir: Path) -> None:
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    for text in (
        "What was learned", "Critic: explained variance", "Clipped tokens", "Engine against trainer", "Entropy",
        "Episodes and sub-traces", "Compactions", "Sampled tokens per second", "Lag", "Time per step",
        "Share of the gradient", "Tokens by lag", "Policy update", "Engine, trainer, reference",
        "outside engines and Megatron", "final held-out pass rate", "tiny-qwen3", "recipes.coding:CodingTask",
        "Sub-trace 3 · final", "compaction: the context goes on from the summary", "summary", "policy", "tool",
    ):  # fmt: skip
        assert text in page.text, text
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) >= 14
    assert all(attrs.get("aria-label") and attrs.get("role") == "img" for attrs in charts)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_share_of_time_is_the_sum_over_the_sum(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    share = sum(row.get("time/other_s", 0) for row in rows) / sum(row.get("time/step_s", 0) for row in rows)
    assert f"<b>{100 * share:.1f} %</b>" in write_report(run_dir).read_text(encoding="utf-8")


def test_nothing_is_fetched(run_dir: Path, tmp_path: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert not re.findall(r"(?i)\bhttps?:|\burl\(|@import|\bsrc=|<link", page)
    curve = write_curve(run_dir, tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"' ]+", curve) == ["http://www.w3.org/2000/svg"]
    assert ElementTree.fromstring(curve).tag == "{http://www.w3.org/2000/svg}svg"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src=x onerror='alert(1)'>\"{{script}}\ud800\x00"
    token = {
        "text": evil,
        "action": True,
        "summary": False,
        "logprob": -1.0,
        "value": 0.5,
        "advantage": 0.1,
        "version": 1,
    }
    context = {
        "text": evil,
        "action": False,
        "summary": False,
        "logprob": None,
        "value": None,
        "advantage": None,
        "version": None,
    }
    record = {
        "step": 0, "split": "eval", "episode_id": evil, "row": evil, "prompt": evil, "reward": 1.0, "status": evil,
        "sub_traces": [{"kind": evil, "tokens": [context, token]}, {"kind": "final", "tokens": [context]}],
        "guard_events": [evil],
    }  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/pass_rate": 0.5}) + "\n")
    (tmp_path / "episodes.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "config.yaml").write_text(
        json.dumps({"run": evil.replace("\ud800", ""), "model": {"name": "<script>x"}})
    )
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "alert(1)" in page.text
    assert "{{script}}" in page.text


def test_size_is_bounded(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [step_metrics(step, 2000, rng) for step in range(2001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    final = {"kind": "final", "tokens": tokens("task[answer]", rng, 1.0)}
    small = [json.dumps({"episode_id": "e", "reward": float(good), "sub_traces": [final] * 2}) for good in range(2)]
    with (tmp_path / "episodes.jsonl").open("w") as out:
        for number in range(10_000):
            head = json.dumps({"step": number // 5, "split": "eval" if number // 5 % 100 == 0 else "train"})
            out.write(f"{head[:-1]}, {small[number % 2][1:]}\n")
        long = episode("long", 1.0, rng)
        long["sub_traces"] = [{"kind": "final", "tokens": long["sub_traces"][0]["tokens"] * 1000}]
        out.write(json.dumps({"step": 2000, "split": "eval", **long}) + "\n")
    assert len(write_report(tmp_path).read_bytes()) < 4_000_000
    chosen = choose(tmp_path / "episodes.jsonl")
    assert len(chosen) <= MAX_EPISODES
    evals = [record["step"] for record in chosen if record["split"] == "eval"]
    assert (min(evals), max(evals)) == (0, 2000)
    assert {record["reward"] for record in chosen if record["split"] == "train"} == {0.0, 1.0}
    steps = sorted({record["step"] for record in chosen if record["split"] == "train"})
    assert max(b - a for a, b in pairwise(steps)) < 500


def test_rare_failure_is_shown(tmp_path: Path) -> None:
    rng = random.Random(2)
    rewards = [1.0] * 20 + [0.0] + [1.0] * 20
    lines = [json.dumps({"step": 1, "split": "eval", **episode(str(i), r, rng)}) for i, r in enumerate(rewards)]
    (tmp_path / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    assert 0.0 in [record["reward"] for record in choose(tmp_path / "episodes.jsonl")]


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0}],
        [{"step": 0, "eval/pass_rate": 0.0, "eval/num_tasks": 4, "eval/pass_rate_stderr": 0.0}],
        [{"step": 1, "policy/loss": 2.0, "time/step_s": 1.0, "time/update_s": 1.0}, {"step": 2, "policy/loss": 1.0}],
        [
            {
                "step": 1,
                "rollout/reward_mean": -3.0,
                "policy/engine_logprob_diff_max": 0.0,
                "rollout/tokens_generated": 5,
            }
        ],
    ],
)
def test_short_and_supervised_runs(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "No sample episodes were kept." in page.text
    assert ("Policy loss" in page.text) == ("policy/loss" in rows[0])
    assert "explained variance" not in page.text
    assert "nan" not in page.text.lower()


def test_runs_without_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics yet"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"eval\.every"):
        write_curve(tmp_path, tmp_path / "curve.svg")


def test_thinning_keeps_the_mean_and_the_end() -> None:
    points = [(float(step), float(step % 7)) for step in range(MAX_POINTS * 4)]
    thinned = thin(points)
    assert len(thinned) == MAX_POINTS
    assert thinned[-1][0] == points[-1][0]
    assert math.isclose(sum(v for _, v in thinned) / len(thinned), sum(v for _, v in points) / len(points))
    assert ticks(0, 1, 4) == [0, 0.5, 1.0]
    assert ticks(0, 45, 9) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]


def test_curves_stay_inside_their_frame() -> None:
    points = [(0.0, -2.0), (1.0, 0.5), (2.0, 9.0)]
    picture = svg(Chart("t", [Series("s", points, errors=[1.0, 1.0, 1.0])], bounds=(0.0, 1.0)), 400, 200)
    line = re.search(r'<polyline[^>]*points="([^"]+)"', picture)
    assert line is not None
    places = [tuple(map(float, pair.split(","))) for pair in line[1].split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert all(0 <= x <= 400 and 10 <= y <= 174 for x, y in places)


def drawn(made: Chart) -> dict[str, list[tuple[float, float]]]:
    return {one.name: list(one.points) for one in made.series if one.points}


def test_a_curve_that_never_leaves_its_neutral_value_is_not_drawn() -> None:
    panel = Panel("t", (Curve("a", "always", 0), Curve("b", "masked", 1, neutral=0.0)))
    rows = [{"step": 1, "a": 0.0, "b": 0.0}, {"step": 2, "a": 0.0, "b": 0.0}]
    assert drawn(chart(rows, panel)) == {"always": [(1, 0), (2, 0)]}
    assert drawn(chart([*rows, {"step": 3, "b": 0.5}], panel))["masked"] == [(1, 0), (2, 0), (3, 0.5)]
    assert drawn(chart([{"step": 1}], panel)) == {}


def test_a_ratio_is_drawn_by_its_distance_from_one_and_logarithms_leave_zero_out() -> None:
    distance = Panel("t", (Curve("a", "ratio", 0, less=1.0),))
    assert drawn(chart([{"step": 1, "a": 1.5}], distance)) == {"ratio": [(1, 0.5)]}
    log = Panel("t", (Curve("a", "kl", 0),), log=True)
    assert drawn(chart([{"step": 1, "a": 0.0}, {"step": 2, "a": 0.1}], log)) == {"kl": [(2, 0.1)]}


def test_lags_of_five_and_more_share_a_layer() -> None:
    row = {"step": 1, **{f"weights/lag_share_{k}": k / 40 for k in range(8)}, "weights/lag_share_8_up": 0.3}
    layers = drawn(lag_shares([row, {"step": 2}]))
    assert list(layers) == ["1", "2", "3", "4", "5 or more"]  # no token has lag 0
    assert layers["5 or more"] == [(1, pytest.approx((5 + 6 + 7) / 40 + 0.3))]
    assert sum(points[0][1] for points in layers.values()) == pytest.approx(1)


def test_values_stand_beside_returns_at_the_last_step_that_has_them() -> None:
    old = {"step": 1, "critic/value_by_turn/0": 9.0, "critic/return_by_turn/0": 9.0, "critic/value_by_turn/2": 9.0}
    new = {"step": 2, "critic/value_by_turn/10": 0.1, "critic/value_by_turn/0": 0.5, "critic/return_by_turn/0": 0.7}
    made = by_place([old, new, {"step": 3, "critic/value_by_position/0": 1.0}], "turn")
    assert drawn(made) == {"mean return": [(1, 0.7)], "mean value": [(1, 0.5), (11, 0.1)]}
    assert "At step 2" in made.note
    assert "turn 1" in svg(made, 400, 200)
    assert drawn(by_place([old, new], "position")) == {}


def test_headings_without_charts_are_left_out() -> None:
    page = curves([{"step": 1, "policy/loss": 1.0}, {"step": 2, "policy/loss": 0.5}])
    assert "Policy update" in page
    for heading in ("Engine, trainer, reference", "Advantages and critic", "Episodes and engines"):
        assert heading not in page


def test_panels_have_titles_and_labels_of_their_own() -> None:
    panels = [*UPDATE, *DIVERGENCE, *CRITIC, *EPISODES]
    assert len({panel.title for panel in panels}) == len(panels)
    for panel in panels:
        assert (
            len({curve.color for curve in panel.curves})
            == len(panel.curves)
            == len({curve.label for curve in panel.curves})
        )


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_loads_without_console_errors(run_dir: Path, tmp_path: Path) -> None:
    page = write_report(run_dir)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
               page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert 'data-color="advantage"' in done.stdout
