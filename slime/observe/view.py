"""What a run looks like in a terminal: a live panel where there is one, plain lines elsewhere.

    with View("ppo_coding", total_steps=50) as view:
        view.phase("rollout")
        view.rollout(finished=12, wanted=64, in_flight=20, tokens_per_s=950.0)
        view.step(metrics)                 # the same mapping that goes to metrics.jsonl
        view.final("held-out pass rate 0.81")

Why rich: it redraws in place, measures wide characters, and keeps other output above the panel.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.text import Text

SPARK = "▁▂▃▄▅▆▇█"
ASCII_SPARK = ".:-=+*#@"
# Where a step's time goes: metric, name, color (Okabe-Ito, told apart by the color-blind).
TIME_PARTS = (
    ("time/rollout_s", "rollout", "#56b4e9"),
    ("time/values_s", "values", "#009e73"),
    ("time/update_s", "update", "#e69f00"),
    ("time/publish_s", "publish", "#cc79a7"),
    ("time/eval_s", "eval", "#f0e442"),
    ("time/other_s", "other", "#999999"),
)
_STEPS_FOR_ETA = 10
_HEADER_EVERY = 20
# Plain columns in the order in which they give way on a narrow terminal: the last go first.
_COLUMNS = (
    ("step", 9),
    ("elapsed", 8),
    ("reward", 7),
    ("s/step", 7),
    ("tok/s", 7),
    ("lag", 4),
    ("ev", 6),
    ("loss", 8),
    ("clip", 6),
    ("|dlogp|", 8),
    ("sub-tr", 7),
    ("version", 8),
)


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """Return `values` as at most `width` bars from the smallest to the largest; buckets show their mean.

    No values or no width gives "". Equal values are drawn at the lowest level.
    """
    if not values or width < 1:
        return ""
    buckets = min(width, len(values))
    edges = [index * len(values) // buckets for index in range(buckets + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    levels = ASCII_SPARK if ascii_only else SPARK
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((mean - low) * scale)] for mean in means)


def duration(seconds: float) -> str:
    """Return seconds as 8s, 3:05 or 1:02:05."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: float) -> str:
    """Return a count in at most five characters: 950, 12.3k, 4.5M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            scaled = number / (1e3 if unit == "k" else limit)
            return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.1f}"


def rate(tokens_per_s: float | None) -> str:
    """Return a rate as `count`; "-" where it was not measured."""
    return "-" if tokens_per_s is None else count(tokens_per_s)


def cells(weights: Sequence[float], width: int) -> list[int]:
    """Return `width` cells shared in proportion to `weights`, largest remainders first; they sum to `width`."""
    total = sum(weights)
    if total <= 0 or width < 1:
        return [0] * len(weights)
    exact = [weight / total * width for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: width - sum(shares)]:
        shares[index] += 1
    return shares


class View:
    """Shows one run. Outside a `with` block only plain lines are written.

    `plain` None: live when stdout is a terminal. `history` are the metrics of steps before this start (a resumed
    run), so that curves go on. `console` is where to write; None: stdout.
    """

    def __init__(
        self,
        run: str,
        total_steps: int,
        plain: bool | None = None,
        history: Sequence[Mapping[str, float]] = (),
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._live: Live | None = None
        self._plain = not self._console.is_terminal if plain is None else plain
        self.run, self.total_steps = run, total_steps
        self.phase_name = "starting"
        self.step_number = 0
        self.progress = (0, 0, 0)  # episodes of the current step: finished, wanted, in flight
        self._tokens_per_s: float | None = None
        self.last: dict[str, float] = {}
        self.rewards: list[float] = []
        self.pass_rates: list[tuple[int, float]] = []
        self._step_times_s: list[float] = []
        self._phases_told: set[str] = set()
        self._lines = 0
        self._final: list[str] = []
        self._elapsed_before_s = 0.0
        for metrics in history:
            self._remember(metrics)
        self._elapsed_before_s = self.last.get("time_s", 0.0)
        self.started_s = self.step_started_s = time.monotonic()

    def __enter__(self) -> Self:
        if not self._plain:
            self._live = Live(_Panel(self), console=self._console, refresh_per_second=2, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the panel before anything else, for example a traceback, is written."""
        self._stop()

    @property
    def elapsed_s(self) -> float:
        return self._elapsed_before_s + time.monotonic() - self.started_s

    @property
    def eta_s(self) -> float | None:
        """Return seconds that the remaining steps will take at the pace of the last ones; None before the first."""
        recent = self._step_times_s[-_STEPS_FOR_ETA:]
        if not recent:
            return None
        pace_s = sum(recent) / len(recent)
        spent_s = min(time.monotonic() - self.step_started_s, pace_s)
        return max(0.0, (self.total_steps - self.step_number) * pace_s - spent_s)

    def phase(self, name: str) -> None:
        """Show the current phase of the run. Plain output names each phase once, until the first step is done."""
        self.phase_name = name
        if self._live is None and not self.last and name not in self._phases_told:
            self._phases_told.add(name)
            self._print(f"  ... {name}")
        self._refresh()

    def rollout(self, finished: int, wanted: int, in_flight: int, tokens_per_s: float | None) -> None:
        """Show the progress of the current step: episodes done, needed and running, tokens sampled a second."""
        self.progress = (finished, wanted, in_flight)
        self._tokens_per_s = tokens_per_s

    def step(self, metrics: Mapping[str, float]) -> None:
        """Show the end of a step: everything that was measured; keys that are missing are shown as '-'."""
        self._remember(metrics)
        self.progress = (0, self.progress[1], self.progress[2])
        self._tokens_per_s = None
        self.step_started_s = time.monotonic()
        if self._live is None:
            self._plain_step()
        self._refresh()

    def rewind(self, history: Sequence[Mapping[str, float]]) -> None:
        """Return to an earlier step: `history` are the metrics of the steps that are not repeated."""
        self.last, self.rewards, self.pass_rates, self._step_times_s = {}, [], [], []
        self.step_number = 0
        for metrics in history:
            self._remember(metrics)
        self.step_started_s = time.monotonic()
        self._refresh()

    def note(self, text: str) -> None:
        """Print a permanent line, for example a warning."""
        if self._live is None:
            self._print(f"  {text}")
        else:
            self._live.console.print(Text(text), soft_wrap=True)

    def final(self, text: str) -> None:
        """End the panel and write the run's last lines below it."""
        self._stop()
        self._print(text)

    def _remember(self, metrics: Mapping[str, float]) -> None:
        self.last = dict(metrics)
        self.step_number = int(metrics.get("step", self.step_number + 1))
        if "rollout/reward_mean" in metrics:
            self.rewards.append(metrics["rollout/reward_mean"])
        if "eval/pass_rate" in metrics:
            self.pass_rates.append((self.step_number, metrics["eval/pass_rate"]))
        if "time/step_s" in metrics and self.step_number > 0:
            self._step_times_s.append(metrics["time/step_s"])

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _print(self, text: str) -> None:
        """Write complete lines to the console, without markup and wrapping."""
        self._console.file.write(text + "\n")
        self._console.file.flush()

    def _plain_step(self) -> None:
        width = self._console.width if self._console.is_terminal else shutil.get_terminal_size((100, 24)).columns
        shown, used = [], 0
        for name, size in _COLUMNS:
            used += size
            if used <= width:
                shown.append((name, size))
        if self._lines % _HEADER_EVERY == 0:
            self._print("".join(f"{name:>{size}}" for name, size in shown))
        self._lines += 1
        values = self._plain_values()
        self._print("".join(f"{values[name]:>{size}}" for name, size in shown))
        if "eval/pass_rate" in self.last:
            self._print(f"{'':9}held-out pass rate {_pass_rate(self.last)}, best {_best(self.pass_rates)}")

    def _plain_values(self) -> dict[str, str]:
        last = self.last

        def show(name: str, form: str) -> str:
            return format(last[name], form) if name in last else "-"

        return {
            "step": f"{self.step_number}/{self.total_steps}",
            "elapsed": duration(last.get("time_s", self.elapsed_s)),
            "reward": show("rollout/reward_mean", ".3f"),
            "s/step": show("time/step_s", ".1f"),
            "tok/s": rate(last.get("rollout/tokens_per_s")),
            "lag": show("weights/lag_max", ".0f"),
            "ev": show("critic/explained_variance", ".2f"),
            "loss": show("policy/loss", ".4f"),
            "clip": show("policy/clip_fraction", ".3f"),
            "|dlogp|": show("policy/engine_logprob_diff_max", ".1e"),
            "sub-tr": show("rollout/num_sub_traces", ".0f"),
            "version": show("weights/version", ".0f"),
        }


def _pass_rate(metrics: Mapping[str, float]) -> str:
    text = f"{metrics['eval/pass_rate']:.3f}"
    if "eval/pass_rate_stderr" in metrics:
        text += f" ± {metrics['eval/pass_rate_stderr']:.3f}"
    if "eval/num_tasks" in metrics:
        text += f" ({metrics['eval/num_tasks']:.0f} tasks)"
    return text


def _best(pass_rates: Sequence[tuple[int, float]]) -> str:
    step, rate = max(pass_rates, key=lambda pair: (pair[1], -pair[0]))
    return f"{rate:.3f} at step {step}"


class _Panel:
    """The live panel: every line is cut to the terminal's width, so the panel never wraps."""

    def __init__(self, view: View) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        for line in self._lines(width, options.ascii_only):
            line.no_wrap, line.overflow = True, "ellipsis"
            line.truncate(width)
            yield line

    def _lines(self, width: int, ascii_only: bool) -> Iterator[Text]:
        view = self._view
        yield self._header()
        yield self._progress(width, ascii_only)
        spark = max(8, min(60, width - 38))
        reward = f"{view.rewards[-1]:.3f}" if view.rewards else "-"
        yield _curve("reward", reward, view.rewards, spark, "#56b4e9", ascii_only)
        rates = [rate for _, rate in view.pass_rates]
        shown = f"{rates[-1]:.3f}  best {max(rates):.3f}" if rates else "-"
        yield _curve("held-out pass rate", shown, rates, spark, "#e69f00", ascii_only)
        yield self._facts(width)
        yield from self._time_bar(width, ascii_only)

    def _header(self) -> Text:
        view = self._view
        eta = "" if view.eta_s is None else f"   left ~{duration(view.eta_s)}"
        return Text.assemble(
            (view.run, "bold"),
            f"   step {min(view.step_number + 1, view.total_steps)}/{view.total_steps}",
            f"   {duration(view.elapsed_s)}{eta}   ",
            (view.phase_name, "italic"),
        )

    def _progress(self, width: int, ascii_only: bool) -> Text:
        view = self._view
        finished, wanted, in_flight = view.progress
        if wanted < 1:
            return Text(f"{'episodes':<19} -", style="dim")
        tail = f" {finished}/{wanted}"
        more = f"  {in_flight} in flight  {rate(view._tokens_per_s)} tok/s" if finished or in_flight else ""
        size = max(8, min(40, width - 20 - len(tail) - len(more)))
        done = min(size, finished * size // wanted)
        full, empty = ("#", ".") if ascii_only else ("━", "─")
        return Text.assemble(
            f"{'episodes':<19} ", (full * done, "#009e73"), (empty * (size - done), "dim"), tail, (more, "dim")
        )

    def _facts(self, width: int) -> Text:
        last = self._view.last
        facts = (
            ("version", f"{last['weights/version']:.0f}" if "weights/version" in last else "-"),
            ("lag", f"{last['weights/lag_max']:.0f}" if "weights/lag_max" in last else "-"),
            ("critic ev", f"{last['critic/explained_variance']:.2f}" if "critic/explained_variance" in last else "-"),
            ("tok/s", rate(last.get("rollout/tokens_per_s"))),
        )
        line = Text(f"{'last step':<19} ")
        for name, value in facts:
            if line.cell_len + len(name) + len(value) + 1 > width:
                break
            line.append(f"{name} ", style="dim")
            line.append(f"{value}   ")
        return line

    def _time_bar(self, width: int, ascii_only: bool) -> Iterator[Text]:
        last = self._view.last
        spent = [(name, color, last[key]) for key, name, color in TIME_PARTS if last.get(key, 0.0) > 0]
        total = sum(seconds for _, _, seconds in spent)
        if total <= 0:
            return
        bar = Text(f"{'time of it':<12}{last.get('time/step_s', total):>6.1f}s ")
        shares = cells([seconds for _, _, seconds in spent], max(8, min(60, width - 21)))
        for (name, color, _), size in zip(spent, shares, strict=True):
            bar.append((name[0] if ascii_only else "█") * size, style=color)
        yield bar
        wide = width >= 90
        legend = Text(" " * 20 if wide else "")
        for name, color, seconds in spent:
            legend.append(f"{name} ", style=color)
            legend.append(f"{100 * seconds / total:.0f}%{'  ' if wide else ' '}", style="dim")
        legend.rstrip()
        yield legend


def _curve(label: str, value: str, values: Sequence[float], width: int, color: str, ascii_only: bool) -> Text:
    line = Text(f"{label:<19} ")
    line.append(f"{value:<18}", style="bold")
    return line.append(sparkline(values, width, ascii_only), style=color)
