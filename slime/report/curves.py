"""The panels of the page: which metrics are shown as curves together. docs/metrics.md explains each metric.

A curve whose metric was never logged is left out, and so is one that never left its `neutral` value (no token was
masked, no group was without signal): a chart without curves is not drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from slime.report.charts import Chart, Series, figure, percent, short

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Curve:
    """One metric of a panel."""

    metric: str
    label: str
    color: int
    neutral: float | None = None
    less: float = 0.0  # is subtracted: a ratio's distance from 1


@dataclass(frozen=True)
class Panel:
    """One chart over training steps."""

    title: str
    curves: tuple[Curve, ...]
    note: str = ""
    form: Callable[[float], str] = short
    log: bool = False  # leaves out what is not above 0
    stacked: bool = False
    bounds: tuple[float, float] | None = None


UPDATE = (
    Panel("Policy loss", (Curve("policy/loss", "policy loss", 0),)),
    Panel(
        "Clipped tokens",
        (
            Curve("policy/clip_fraction", "policy: outside the clip", 3),
            Curve("policy/correction_masked", "masked by the correction", 1, neutral=0.0),
            Curve("critic/clip_fraction", "critic: clipped values", 2, neutral=0.0),
        ),
        "Share of action tokens outside the window.",
        percent,
    ),
    Panel(
        "Largest probability ratio",
        (Curve("policy/ratio_max", "largest ratio", 0),),
        "Of the policy to what the loss compares it with.",
    ),
    Panel(
        "Mean probability ratio, less 1",
        (Curve("policy/ratio_mean", "mean ratio - 1", 0, less=1.0),),
        "0 in expectation for tokens sampled by what it is compared with.",
    ),
    Panel("Entropy", (Curve("policy/entropy", "entropy", 5),), "Mean per action token, in nats."),
    Panel(
        "Gradient norm",
        (Curve("policy/grad_norm", "policy", 0), Curve("critic/grad_norm", "critic", 2)),
        "Before clipping.",
    ),
    Panel("Learning rate", (Curve("policy/lr", "policy", 0), Curve("critic/lr", "critic", 2))),
    Panel("Likelihood loss", (Curve("policy/nll", "negative log-likelihood", 4),), "Of episodes with positive reward."),
    Panel(
        "Share of the gradient",
        (
            Curve("policy/gradient_share/final", "last part", 0, neutral=0.0),
            Curve("policy/gradient_share/compacted", "before a compaction", 1, neutral=0.0),
            Curve("policy/gradient_share/summary", "summaries", 2, neutral=0.0),
            Curve("policy/gradient_share/sub_agent", "sub-agents", 3, neutral=0.0),
        ),
        "Sum of |d loss / d log pi| by kind of token, stacked.",
        percent,
        stacked=True,
        bounds=(0.0, 1.0),
    ),
)
DIVERGENCE = (
    Panel(
        "KL divergence",
        (
            Curve("policy/kl", "by this step's updates", 0),
            Curve("policy/engine_kl", "engine from trainer", 1),
            Curve("policy/reference_kl", "from the reference", 2),
        ),
        "Nats per action token.",
        log=True,
    ),
    Panel(
        "Engine against trainer",
        (
            Curve("policy/engine_logprob_diff_max", "largest", 4),
            Curve("policy/engine_logprob_diff_mean", "mean", 5),
        ),
        "Log-prob difference on tokens of the current weights.",
        log=True,
    ),
    Panel(
        "Ratio of trainer to engine",
        (Curve("policy/rho_max", "largest", 0), Curve("policy/rho_min", "smallest", 1)),
        "rho = pi_old / mu over all action tokens.",
        log=True,
    ),
    Panel("Correction", (Curve("policy/correction_mean", "mean weight", 1, neutral=1.0),), "1: no correction."),
    Panel(
        "Lag",
        (Curve("weights/lag_max", "oldest token", 5), Curve("weights/lag_mean", "mean", 0)),
        "Weight versions between sampling and training.",
    ),
)
CRITIC = (
    Panel(
        "Advantage",
        (
            Curve("advantage/abs_max", "largest size", 1),
            Curve("advantage/std", "standard deviation", 0),
            Curve("advantage/mean", "mean", 5),
        ),
        "Over action tokens.",
    ),
    Panel(
        "Groups without signal",
        (Curve("advantage/zero_signal_groups", "zero-signal groups", 3),),
        "Share of groups whose rewards are all equal.",
        percent,
    ),
    Panel(
        "Critic: explained variance",
        (Curve("critic/explained_variance", "explained variance", 2),),
        "1: returns foretold; 0: no better than their mean.",
    ),
    Panel(
        "Critic: calibration error",
        (Curve("critic/calibration_error", "calibration error", 2),),
        "Mean distance of value and return.",
    ),
    Panel("Critic loss", (Curve("critic/loss", "critic loss", 2),)),
)
EPISODES = (
    Panel(
        "Episodes and sub-traces",
        (Curve("rollout/num_episodes", "episodes", 0), Curve("rollout/num_sub_traces", "sub-traces", 1)),
        "Trained in each step.",
    ),
    Panel("Compactions", (Curve("rollout/compactions_per_episode", "compactions", 4),), "Per episode."),
    Panel(
        "Truncated episodes",
        (Curve("rollout/truncated_fraction", "truncated", 1),),
        "Share that ran out of a budget.",
        percent,
    ),
    Panel(
        "Time of an episode",
        (
            Curve("rollout/seconds_max", "slowest", 1),
            Curve("rollout/seconds_p95", "95 of 100 are below", 4),
            Curve("rollout/seconds_mean", "mean", 0),
        ),
        "Seconds.",
    ),
    Panel(
        "Slowest episode against the mean",
        (Curve("rollout/straggler_ratio", "straggler ratio", 3),),
        "What a synchronous step waits for.",
    ),
)
# The lags that have a color of their own; older ones share the last.
_LAGS = ("0", "1", "2", "3", "4", "5 or more")
_BESIDE = (("return", 1), ("value", 2))


def points(rows: Rows, name: str, less: float = 0.0) -> list[tuple[float, float]]:
    """Return (step, value) wherever the metric was logged."""
    return [(row["step"], row[name] - less) for row in rows if name in row]


def pass_rate(rows: Rows) -> Series:
    """Return the held-out curve with its standard errors."""
    evals = [row for row in rows if "eval/pass_rate" in row]
    errors = [row.get("eval/pass_rate_stderr", 0.0) for row in evals]
    return Series(
        "held-out pass rate",
        points(evals, "eval/pass_rate"),
        color=0,
        errors=errors if any(errors) else (),
        dots=len(evals) <= 60,
    )


def curves(rows: Rows) -> str:
    """Return all figures, under headings; a heading without figures is left out."""
    groups = (
        ("Policy update", [chart(rows, panel) for panel in UPDATE]),
        ("Engine, trainer, reference", [*(chart(rows, panel) for panel in DIVERGENCE), lag_shares(rows)]),
        (
            "Advantages and critic",
            [*(chart(rows, panel) for panel in CRITIC), by_place(rows, "position"), by_place(rows, "turn")],
        ),
        ("Episodes and engines", [*(chart(rows, panel) for panel in EPISODES), speed(rows)]),
    )
    parts = [figure(learned(rows), wide=True)]
    for heading, charts in groups:
        figures = "".join(figure(one) for one in charts)
        if figures:
            parts.append(f'<h3 class="part">{escape(heading)}</h3>{figures}')
    return "".join(parts)


def learned(rows: Rows) -> Chart:
    """Return held-out pass rate and training reward."""
    reward = points(rows, "rollout/reward_mean")
    window = max(5, len(reward) // 40)
    series: list[Series] = [pass_rate(rows)]
    if len(reward) > window:
        series.append(Series("training reward", reward, color=1, faint=True))
        series.append(Series(f"training reward, mean of {window} steps", _smooth(reward, window), color=1))
    else:
        series.append(Series("training reward", reward, color=1))
    return Chart(
        "What was learned",
        series,
        note="Pass rate on tasks that are never trained on, with one standard error; reward of training episodes.",
        bounds=(0.0, 1.0) if all(0.0 <= value <= 1.0 for _, value in reward) else None,
    )


def chart(rows: Rows, panel: Panel) -> Chart:
    """Return a panel with the numbers of a run."""
    series = []
    for curve in panel.curves:
        found = [point for point in points(rows, curve.metric, curve.less) if point[1] > 0 or not panel.log]
        if all(value == curve.neutral for _, value in found):
            found = []
        series.append(Series(curve.label, found, curve.color))
    return Chart(
        panel.title, series, panel.note, bounds=panel.bounds, log=panel.log, form=panel.form, stacked=panel.stacked
    )


def lag_shares(rows: Rows) -> Chart:
    """Return action tokens by their lag, stacked: one layer per lag, the last for all older ones."""
    own = len(_LAGS) - 1
    layers: list[list[tuple[float, float]]] = [[] for _ in _LAGS]
    for row in rows:
        shares = {name: row[name] for name in row if name.startswith("weights/lag_share_")}
        if not shares:
            continue
        heights = [shares.pop(f"weights/lag_share_{lag}", 0.0) for lag in range(own)]
        for layer, height in zip(layers, [*heights, sum(shares.values())], strict=True):
            layer.append((row["step"], height))
    series = [
        Series(name, layer if any(height for _, height in layer) else [], color)
        for color, (name, layer) in enumerate(zip(_LAGS, layers, strict=True))
    ]
    note = "Share of action tokens by weight versions since their sampling, stacked."
    return Chart("Tokens by lag", series, note, bounds=(0.0, 1.0), form=percent, stacked=True)


def by_place(rows: Rows, place: str) -> Chart:
    """Return the critic's mean value beside the mean return, by fifth of the episode or by turn, at the last step that
    has it.

    `place`: position or turn. Bins without tokens are not logged and not drawn.
    """
    pattern = re.compile(rf"critic/(value|return)_by_{place}/(\d+)")
    found: dict[str, list[tuple[float, float]]] = {"value": [], "return": []}
    step = 0.0
    for row in reversed(rows):
        matches = [(pattern.fullmatch(name), number) for name, number in row.items()]
        if not any(match for match, _ in matches):
            continue
        for match, number in matches:
            if match:
                found[match[1]].append((float(match[2]) + 1.0, number))
        step = row["step"]
        break
    where, x_name = ("fifth of the episode", "fifth") if place == "position" else ("turn", "turn")
    series = [Series(f"mean {what}", sorted(found[what]), color, dots=True) for what, color in _BESIDE]
    note = f"At step {step:.0f}: apart where the critic is wrong."
    return Chart(f"Value and return by {where}", series, note, x_name=x_name)


def speed(rows: Rows) -> Chart:
    """Return sampled tokens per second, over the time in which episodes ran."""
    rates = [(row["step"], row["rollout/tokens_per_s"]) for row in rows if "rollout/tokens_per_s" in row]
    return Chart("Sampled tokens per second", [Series("tokens/s", rates, 2)], "While episodes ran, all engines.")


def _smooth(values: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Return the mean of each point and the `window` - 1 points before it."""
    means = []
    for index, (step, _) in enumerate(values):
        recent = values[max(0, index - window + 1) : index + 1]
        means.append((step, sum(value for _, value in recent) / len(recent)))
    return means
