"""Critic or group baseline: what a run's own numbers say about its choice.

    for line in advise(read_metrics(run_dir), read_config(run_dir)).lines(): print(line)

Pure: rows of metrics.jsonl and the values of config.yaml go in, a verdict with the figures behind it comes out. Three
conditions decide whether a critic pays off (docs/algorithms.md): groups without signal, episodes that are cut into
parts which would share one number, and rollout times so uneven that waiting for whole groups costs more than a second
model. A figure counts only where it lies beyond its threshold by two standard errors over the last steps; else
the run keeps what it has. What a run can't know of itself is `not known`, and never a reason to switch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

Rows = Sequence[Mapping[str, float]]

MIN_STEPS = 5  # training steps; below, a standard error over steps says nothing
WINDOW = 20  # the last training steps that are looked at: the policy of long ago is another one
CERTAIN = 2.0  # standard errors
GROUP = 8  # episodes a prompt of the group baseline that a critic's run is compared with: the field's usual 8 to 16

# Above one half a group with signal costs the sampling of more than two; a critic's training costs about as much as
# the policy's own update and wastes no episode.
ZERO_SIGNAL = 0.5
# Compactions an episode. Where no episode is compacted twice, at 0.5 every second one is cut in two; all its parts,
# the summary that decides over what follows among them, would get one number.
COMPACTIONS = 0.5
# Slowest episode over the mean: with a place for every episode, places are busy for 1/ratio of a synchronous step,
# so above 2 more than half of the sampling capacity waits.
STRAGGLER = 2.0
# Share of the return's variance that the critic leaves in the advantage (for lambda 1 it is just this): above 0.95
# it does hardly better than subtracting the step's mean, which costs nothing.
NOISE = 0.95

# Settings of a critic's run that have no meaning without one; and grpo divides by the group's deviation already.
_WITHOUT_CRITIC = {"credit": "chained", "gamma": 1, "truncation": "terminal", "whiten": False}
_REWARD = "rollout/reward_mean"


@dataclass(frozen=True)
class Figure:
    """One line of the table. `value` None: unknown; `stderr`: over steps; `threshold` None: shown, not judged."""

    name: str
    value: float | None
    threshold: float | None
    says: str
    stderr: float = 0.0
    percent: bool = False
    at_least: bool = False  # the value is a lower bound

    @property
    def above(self) -> bool:
        """Return whether the value is certainly above its threshold."""
        known = self.value is not None and self.threshold is not None
        return known and self.value - CERTAIN * self.stderr > self.threshold  # type: ignore[operator]

    @property
    def below(self) -> bool:
        """Return whether the value is certainly below its threshold."""
        known = self.value is not None and self.threshold is not None
        return known and self.value + CERTAIN * self.stderr < self.threshold  # type: ignore[operator]

    @property
    def text(self) -> str:
        """Return the value as text."""
        if self.value is None:
            return "not known"
        spread = f" ± {self._number(self.stderr)}" if self.stderr else ""
        return f"{'>= ' if self.at_least else ''}{self._number(self.value)}{spread}{' %' if self.percent else ''}"

    @property
    def brief(self) -> str:
        """Return the value alone, for the verdict."""
        return replace(self, stderr=0.0).text

    @property
    def limit(self) -> str:
        """Return the threshold as text."""
        return "" if self.threshold is None else self._number(self.threshold) + (" %" if self.percent else "")

    def _number(self, value: float) -> str:
        scaled = 100 * value if self.percent else value
        return f"{scaled:.0f}" if abs(scaled) >= 100 else f"{scaled:.2g}"


@dataclass(frozen=True)
class Advice:
    """A verdict, its reason, the settings to change, and all figures."""

    verdict: str
    reasons: tuple[str, ...]
    settings: str  # what to put on the command line of a new run; empty: nothing changes
    steps: tuple[int, int]  # first and last step that was looked at
    figures: tuple[Figure, ...]

    def lines(self) -> list[str]:
        """Return what `slime advise` prints."""
        rows = [("figure", "value", "threshold", "what it says")]
        rows += [(one.name, one.text, one.limit, one.says) for one in self.figures]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]).rstrip()
            for row in rows
        ]
        change = ["", f"in a new run (run=NAME): {self.settings}"] if self.settings else []
        told = f"steps {self.steps[0]} to {self.steps[1]}; ±: standard error over them"
        return [f"{self.verdict}: {'; '.join(self.reasons)}", *change, "", *table, "", told]


def advise(rows: Rows, config: Mapping[str, Any]) -> Advice:
    """Return advice on the baseline. `config`: config.yaml as plain values.

    ValueError: not a run of reinforcement learning, or fewer than MIN_STEPS training steps.
    """
    kind = config.get("kind", "ppo")
    if kind != "ppo":
        raise ValueError(f"kind={kind}: only runs of kind ppo have a baseline to choose")
    steps = [row for row in rows if _REWARD in row]
    if len(steps) < MIN_STEPS:
        raise ValueError(f"not enough steps: {len(steps)} of training are in metrics.jsonl, {MIN_STEPS} are needed")
    recent = steps[-WINDOW:]
    baseline = _inside(config, "advantage", "baseline", "critic")
    group = int(_inside(config, "buffer", "episodes_per_prompt", 1))
    cut, slow = _compactions(recent), _straggler(recent)
    told = (cut, _tokens(recent), slow, _tail(recent))
    span = int(recent[0]["step"]), int(recent[-1]["step"])
    if baseline == "critic":
        penalised = _inside(config, "policy", "kl_coef", 0) > 0 and _inside(config, "policy", "kl_in", "") == "reward"
        signal, noise = _signal_bound(recent, group if group > 1 else GROUP, penalised), _noise(recent)
        verdict, reasons, settings = _of_critic(signal, noise, cut, slow, config)
        return Advice(verdict, reasons, settings, span, (signal, noise, *told))
    signal = _signal(recent, group)
    verdict, reasons, settings = _of_groups(signal, cut, slow, config)
    return Advice(verdict, reasons, settings, span, (signal, *told))


def _of_critic(
    signal: Figure, noise: Figure, cut: Figure, slow: Figure, config: Mapping[str, Any]
) -> tuple[str, tuple[str, ...], str]:
    """Advise against a critic only if it predicts nothing and no condition favors it."""
    explains = "" if noise.value is None else f"it explains {100 * (1 - noise.value):.0f} % of the return's variance"
    if noise.above and cut.below and slow.below and not _reached(signal):
        short = f"{cut.brief} compactions an episode, slowest {slow.brief} times the mean"
        return "switch to a group baseline", (explains.replace("it", "the critic", 1), short), _to_groups(config)
    reasons = [explains] if explains and not noise.above else []
    if not cut.below and cut.value is not None:
        reasons.append(f"{cut.brief} compactions an episode")
    if _reached(signal):
        reasons.append(f"{signal.brief} of groups would be without signal")
    if not slow.below and slow.value is not None:
        reasons.append(f"slowest episode {slow.brief} times the mean")
    reasons = reasons or ["too little is known of this run to leave it"]
    if noise.above:
        reasons.append(f"but {explains}: see critic/explained_variance in docs/metrics.md")
    return "keep the critic", tuple(reasons), ""


def _of_groups(
    signal: Figure, cut: Figure, slow: Figure, config: Mapping[str, Any]
) -> tuple[str, tuple[str, ...], str]:
    """Advise a critic if the signal is missing (equal groups) or blurred (cut episodes). Time alone is no reason."""
    without = f"{signal.brief} of groups are without signal"
    reasons = [without] if signal.above else []
    if cut.above:
        reasons.append(f"{cut.brief} compactions an episode, whose parts share one number")
    if reasons:
        if slow.above:
            reasons.append(f"slowest episode {slow.brief} times the mean")
        return "switch to a critic", tuple(reasons), _to_critic(config)
    known = [without] if signal.value is not None else []
    known += [f"{cut.brief} compactions an episode"] if cut.value is not None else []
    name = _inside(config, "advantage", "baseline", "")
    return f"keep the baseline {name}", tuple(known or ["too little is known of this run to leave it"]), ""


def _reached(bound: Figure) -> bool:
    return bound.value is not None and bound.threshold is not None and bound.value >= bound.threshold


def _to_groups(config: Mapping[str, Any]) -> str:
    """Return the settings for groups of GROUP. The buffer's numbers of episodes are raised to multiples of it."""
    parts = ["advantage.baseline=grpo", f"buffer.episodes_per_prompt={GROUP}"]
    for key, needed in _WITHOUT_CRITIC.items():
        if _inside(config, "advantage", key, needed) != needed:
            parts.append(f"advantage.{key}={str(needed).lower()}")
    per_step = int(_inside(config, "buffer", "episodes_per_step", GROUP))
    for name in ("episodes_per_step", "slots", "window"):
        number = int(_inside(config, "buffer", name, per_step))
        if number % GROUP and (name == "episodes_per_step" or number != per_step):  # others follow it by default
            parts.append(f"buffer.{name}={-(-number // GROUP) * GROUP}")
    return " ".join(parts)


def _to_critic(config: Mapping[str, Any]) -> str:
    """Return the settings for one episode per prompt, and for ten steps of value pre-training unless it is set."""
    parts = ["advantage.baseline=critic", "buffer.episodes_per_prompt=1"]
    if not _inside(config, "critic", "warmup_episodes", 0):
        parts.append(f"critic.warmup_episodes={10 * int(_inside(config, 'buffer', 'episodes_per_step', 128))}")
    return " ".join(parts)


def _signal(rows: Rows, group: int) -> Figure:
    name = "groups without signal"
    if group < 2:
        return Figure(name, None, ZERO_SIGNAL, "there are no groups: every prompt has one episode", percent=True)
    mean, stderr = _mean(rows, "advantage/zero_signal_groups")
    says = f"of {group} equal rewards no one is better than the group: nothing is learned from them"
    return Figure(name, mean, ZERO_SIGNAL, says, stderr, percent=True)


def _signal_bound(rows: Rows, group: int, penalised: bool) -> Figure:
    """Return a lower bound of the share of groups with equal rewards.

    A prompt with pass rate p_j has G equal rewards with probability f(p_j), f(p) = p^G + (1 - p)^G. f is convex for
    G >= 2, so the mean of f(p_j) over prompts is at least f(mean of p_j) (Jensen): prompts that differ only raise it.
    That holds for rewards of 0 and 1, which are known by their variance: exactly p (1 - p) in every step. It counts
    terminal rewards alone: a KL in the reward (`penalised`) or rewards of single turns make equal episodes differ.
    """
    name = f"groups of {group} without signal"
    if penalised or not all(_zero_or_one(row) for row in rows):
        says = "can be bounded only for terminal rewards of 0 and 1 (rollout/reward_std) without a KL in them"
        return Figure(name, None, ZERO_SIGNAL, says, percent=True)
    counts = [row.get("rollout/num_episodes", 1.0) for row in rows]
    p = math.fsum(row[_REWARD] * count for row, count in zip(rows, counts, strict=True)) / math.fsum(counts)
    says = f"what pass rate {p:.2f} gives when all prompts are equally hard; more when they are not"
    return Figure(name, p**group + (1 - p) ** group, ZERO_SIGNAL, says, percent=True, at_least=True)


def _zero_or_one(row: Mapping[str, float]) -> bool:
    p, std = row[_REWARD], row.get("rollout/reward_std", math.nan)
    return 0 <= p <= 1 and abs(std**2 - p * (1 - p)) <= 1e-6


def _noise(rows: Rows) -> Figure:
    explained, stderr = _mean(rows, "critic/explained_variance")
    says = "share of the return's variance that stays in the advantage: 1 - critic/explained_variance"
    value = None if explained is None else 1 - explained
    return Figure("noise left by the critic", value, NOISE, says, stderr, percent=True)


def _compactions(rows: Rows) -> Figure:
    mean, stderr = _mean(rows, "rollout/compactions_per_episode")
    says = "each cuts an episode; without a critic its parts share one number"
    return Figure("compactions an episode", mean, COMPACTIONS, says, stderr)


def _tokens(rows: Rows) -> Figure:
    per_episode = [
        {"tokens": row["rollout/tokens_generated"] / row["rollout/num_episodes"]}
        for row in rows
        if row.get("rollout/num_episodes", 0) > 0 and "rollout/tokens_generated" in row
    ]
    mean, stderr = _mean(per_episode, "tokens")
    return Figure("sampled tokens an episode", mean, None, "as many share one number without a critic", stderr)


def _straggler(rows: Rows) -> Figure:
    mean, stderr = _mean(rows, "rollout/straggler_ratio")
    says = "slowest episode over the mean: a synchronous step waits for it, a group always does"
    return Figure("straggler ratio", mean, STRAGGLER, says, stderr)


def _tail(rows: Rows) -> Figure:
    ratios = [
        {"ratio": row["rollout/seconds_p95"] / row["rollout/seconds_mean"]}
        for row in rows
        if row.get("rollout/seconds_mean", 0) > 0 and "rollout/seconds_p95" in row
    ]
    mean, stderr = _mean(ratios, "ratio")
    says = "of an episode's time: near the ratio above, many are slow; far below it, single ones"
    return Figure("95th percentile over mean", mean, None, says, stderr)


def _mean(rows: Rows, name: str) -> tuple[float | None, float]:
    """Return the mean over the steps that logged it and its standard error; (None, 0) for fewer than MIN_STEPS."""
    values = [row[name] for row in rows if name in row]
    if len(values) < MIN_STEPS:
        return None, 0.0
    return fmean(values), stdev(values) / math.sqrt(len(values))


def _inside(config: Mapping[str, Any], section: str, key: str, default: Any) -> Any:
    found = config.get(section)
    return found.get(key, default) if isinstance(found, Mapping) else default
