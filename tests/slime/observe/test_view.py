"""The view: pure helpers, plain lines, and a live panel that fits its terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from slime.observe.view import View, _Panel, cells, count, duration, sparkline

METRICS = {
    "step": 7,
    "time_s": 3700.0,
    "rollout/reward_mean": 0.25,
    "rollout/tokens_generated": 20_000,
    "rollout/tokens_per_s": 1250.0,
    "rollout/num_sub_traces": 131,
    "policy/loss": -0.0123,
    "policy/clip_fraction": 0.01,
    "policy/engine_logprob_diff_max": 3e-5,
    "critic/explained_variance": 0.5,
    "weights/version": 7,
    "weights/lag_max": 1,
    "time/step_s": 40.0,
    "time/rollout_s": 16.0,
    "time/values_s": 3.0,
    "time/update_s": 18.0,
    "time/publish_s": 1.0,
    "time/other_s": 2.0,
}
EVAL = {"eval/pass_rate": 0.5, "eval/num_tasks": 128, "eval/pass_rate_stderr": 0.04}


def make_view(width: int = 100, plain: bool = True) -> tuple[View, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    return View("ppo_coding", 45, plain=plain, console=console), out


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"  # buckets show their mean
    assert sparkline([3, 3, 3], 8) == "▁▁▁"
    assert sparkline([], 8) == sparkline([1.0], 0) == ""
    assert sparkline([0, 1], 8, ascii_only=True).isascii()


def test_cells_sum_to_the_width() -> None:
    assert cells([1, 1, 2], 8) == [2, 2, 4]
    assert cells([1, 1, 1], 10) == [4, 3, 3]
    assert sum(cells([0.01, 5.3, 2.2, 0.4], 37)) == 37
    assert cells([0.0, 0.0], 10) == [0, 0]


def test_numbers() -> None:
    assert [duration(s) for s in (0, 59.4, 60, 185, 3725)] == ["0s", "59s", "1:00", "3:05", "1:02:05"]
    assert [count(n) for n in (0, 950, 1334, 12_345, 345_678, 4.5e6)] == ["0", "950", "1,334", "12.3k", "346k", "4.5M"]


def test_plain_lines_align_and_repeat_their_header() -> None:
    view, out = make_view()
    with view:
        for step in range(45):
            view.step(METRICS | {"step": step} | (EVAL if step % 10 == 0 else {}))
    lines = out.getvalue().splitlines()
    headers = [line for line in lines if "reward" in line]
    assert len(headers) == 3
    rows = [line for line in lines if re.match(r" *\d+/45 ", line)]
    assert len(rows) == 45
    assert {len(line) for line in rows} == {len(headers[0])}
    assert "held-out pass rate 0.500 ± 0.040 (128 tasks), best 0.500 at step 0" in out.getvalue()
    assert out.getvalue().count("held-out") == 5


def test_plain_shows_missing_metrics_as_dashes() -> None:
    view, out = make_view()
    view.phase("starting engines")
    view.phase("starting engines")
    view.step({"step": 1, "policy/loss": 2.5})
    header, row = out.getvalue().splitlines()[1:]
    assert out.getvalue().count("starting engines") == 1
    assert dict(zip(header.split(), row.split(), strict=True))["loss"] == "2.5000"
    assert dict(zip(header.split(), row.split(), strict=True))["ev"] == "-"


@pytest.mark.parametrize("width", [20, 60, 80, 120, 250])
def test_everything_fits_the_terminal(width: int) -> None:
    view, out = make_view(width, plain=False)
    for metrics in ({"step": 0} | EVAL, METRICS, METRICS | EVAL):
        view.rollout(finished=40, wanted=64, in_flight=20, tokens_per_s=900.0)
        view._remember(metrics)
        view._console.print(_Panel(view))
    assert max(cell_len(line) for line in out.getvalue().splitlines()) <= width
    plain, out = make_view(width, plain=True)
    plain.step(METRICS)
    assert max(len(line) for line in out.getvalue().splitlines()) <= width


def test_panel_tells_what_matters() -> None:
    view, out = make_view(120, plain=False)
    view._remember(METRICS | EVAL)
    view.phase_name = "rollout"
    view.rollout(finished=16, wanted=64, in_flight=20, tokens_per_s=900.0)
    view._console.print(_Panel(view))
    text = out.getvalue()
    for part in ("ppo_coding", "step 8/45", "rollout", "16/64", "20 in flight", "0.250", "0.500", "version 7", "lag 1"):
        assert part in text, part
    for part in ("critic ev 0.50", "1,250", "update 45%", "publish 2%", "left ~25:"):
        assert part in text, part


def test_steps_that_happen_again_are_forgotten() -> None:
    view = View("demo", 45, plain=True, console=Console(file=io.StringIO()))
    rows = [METRICS | {"step": step} | EVAL for step in range(1, 5)]
    for row in rows:
        view.step(row)
    view.rewind(rows[:2])
    assert (view.step_number, len(view.rewards), [step for step, _ in view.pass_rates]) == (2, 2, [1, 2])
    view.rewind([])
    assert (view.step_number, view.rewards, view.pass_rates, view.eta_s) == (0, [], [], None)


def test_history_goes_on_after_a_resume() -> None:
    console = Console(file=io.StringIO(), width=80)
    view = View("demo", 45, plain=True, history=[METRICS | {"step": s} | EVAL for s in range(1, 8)], console=console)
    assert view.elapsed_s >= 3700
    assert len(view.rewards) == len(view.pass_rates) == 7
    assert view.step_number == 7


def test_live_panel_ends_before_a_traceback() -> None:
    """On a real pseudo-terminal: prints stay above the panel, the traceback comes whole and last."""
    code = (
        "import time; from slime.observe.view import View\n"
        "with View('demo', 3) as view:\n"
        "    view.rollout(1, 4, 3, 100); view.step({'step': 1, 'rollout/reward_mean': 0.5}); print('printed')\n"
        "    view.note('a note')\n"
        "    raise ValueError('the end')\n"
    )
    master, slave = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            seen += part
        assert process.wait(timeout=60) == 1
    os.close(master)
    text = seen.decode()
    trace = text.index("Traceback (most recent call last)")
    assert text.index("printed") < trace
    assert text.index("a note") < trace
    assert text.rindex("held-out pass rate") < trace
    assert "\x1b" not in text[trace:].replace("\x1b[?25h", "")
    assert text.rstrip().endswith("ValueError: the end")
