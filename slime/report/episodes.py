"""Sample episodes as HTML: sub-traces as cards in time order, action tokens colored by advantage or value.

Every piece of text in an episode is hostile until it is escaped: models, tools and task files wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from buffer.text import clean_text
from slime.report.charts import short

MAX_EPISODES = 60
MAX_GROUPS = 15  # (step, split) pairs that episodes are taken from
MAX_TOKENS = 1200  # of one sub-trace; the middle of a longer one is left out
MAX_EPISODE_TOKENS = 2400
MAX_TOKEN_CHARS = 80
MAX_SUB_TRACES = 24
NUM_SHADES = 4  # of each color: advantages have classes n4..n1, z, p1..p4, values v0..v8

_KINDS = {"final": "final", "compacted": "compacted", "sub_agent": "sub-agent"}
_ARROWS = {
    "compacted": "compaction: the context goes on from the summary",
    "sub_agent": "sub-agent returned",
    "final": "next",
}


@dataclass(frozen=True)
class Scale:
    """The values of full color: the largest |advantage|, and the smallest and largest value."""

    advantage: float
    low: float
    high: float


@dataclass(frozen=True)
class _Line:
    """The place of an episode in the file, and the facts by which it is chosen."""

    offset: int
    step: int
    split: str
    reward: float


def choose(path: Path) -> list[dict[str, Any]]:
    """Return at most MAX_EPISODES episodes in step order, evenly over the run, high and low rewards alike.

    The first and the last evaluation are always among them. The file is read twice, a line at a time. A torn last
    line is left out; ValueError names a line that is not an episode.
    """
    if not path.is_file():
        return []
    groups: dict[tuple[int, str], list[_Line]] = {}
    for line in _index(path):
        groups.setdefault((line.step, line.split), []).append(line)
    keys = _groups(sorted(groups))
    if not keys:
        return []
    quota, extra = divmod(MAX_EPISODES, len(keys))
    chosen: list[_Line] = []
    for number, key in enumerate(keys):
        chosen += _both_ends(groups[key], min(8, quota + (number < extra)))
    with path.open("rb") as lines:
        return [_read(lines, line.offset) for line in chosen]


def _read(lines: Any, offset: int) -> dict[str, Any]:
    lines.seek(offset)
    record: dict[str, Any] = json.loads(lines.readline())
    return record


def _index(path: Path) -> Iterator[_Line]:
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                try:
                    record = json.loads(line)
                    yield _Line(offset, int(record["step"]), str(record["split"]), float(record.get("reward") or 0.0))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}:{number}: not an episode ({error!r}): remove the line") from error
            offset += len(line)


def _groups(keys: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return evenly spaced keys. Half are evaluations if there are enough; the first and last always are."""
    evals = [key for key in keys if key[1] == "eval"]
    others = [key for key in keys if key[1] != "eval"]
    num_evals = min(len(evals), max(MAX_GROUPS // 2, MAX_GROUPS - len(others)))
    kept = _evenly(evals, num_evals) + _evenly(others, MAX_GROUPS - num_evals)
    return sorted(kept, key=lambda key: (key[0], key[1] == "eval", key[1]))  # a step is evaluated after its training


def _evenly(keys: Sequence[tuple[int, str]], wanted: int) -> list[tuple[int, str]]:
    if len(keys) <= wanted:
        return list(keys)
    if wanted < 2:
        return list(keys[-1:])[:wanted]
    return [keys[index * (len(keys) - 1) // (wanted - 1)] for index in range(wanted)]


def _both_ends(lines: Sequence[_Line], wanted: int) -> list[_Line]:
    """Choose the best, worst, second best, ... of a group, and return them from the best to the worst."""
    ranked = sorted(lines, key=lambda line: (-line.reward, line.offset))
    top, bottom = -(-wanted // 2), wanted // 2
    return ranked if len(ranked) <= wanted else ranked[:top] + ranked[len(ranked) - bottom :]


def scale(records: Iterable[Mapping[str, Any]]) -> Scale:
    """Return the color scale of all shown episodes: 95th percentile of |advantage|; 0..1 or the wider range of
    values.
    """
    advantages, values = [], []
    for record in records:
        for sub_trace in record.get("sub_traces", ()):
            for token in sub_trace.get("tokens", ()):
                if token.get("advantage") is not None:
                    advantages.append(abs(float(token["advantage"])))
                if token.get("value") is not None:
                    values.append(float(token["value"]))
    advantages.sort()
    top = advantages[int(0.95 * (len(advantages) - 1))] if advantages else 0.0
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low >= 0.0 and high <= 1.0:
        low, high = 0.0, 1.0
    return Scale(top or 1.0, low, high)


def render(records: Sequence[Mapping[str, Any]]) -> str:
    """Return all groups, one <section> per step and split; "" if there are no episodes."""
    colors = scale(records)
    parts: list[str] = []
    last = (int(records[-1]["step"]), str(records[-1]["split"])) if records else None
    is_open = True  # the first episode of the first and of the last group
    for (step, split), group in groupby(records, key=lambda record: (int(record["step"]), str(record["split"]))):
        name = {"eval": "held-out evaluation", "train": "training"}.get(split, split)
        parts.append(f'<section class="group"><h3>Step {step} <span>{escape(clean_text(name))}</span></h3>')
        is_open = is_open or (step, split) == last
        for record in group:
            parts.append(_episode(record, colors, is_open))
            is_open = False
        parts.append("</section>")
    return "".join(parts)


def _episode(record: Mapping[str, Any], colors: Scale, is_open: bool) -> str:
    reward = float(record.get("reward") or 0.0)
    status = _text(record.get("status", ""), 40)
    tone = "good" if reward > 0.5 else "bad"
    sub_traces = record.get("sub_traces", ())
    events = record.get("guard_events", ())
    prompt = _text(" ".join(str(record.get("prompt", "")).split()), 160)
    badges = f'<b class="badge {tone}">reward {short(reward)}</b><b class="badge {_status_tone(status)}">{status}</b>'
    if len(sub_traces) > 1:
        badges += f'<b class="badge plain">{len(sub_traces)} sub-traces</b>'
    if events:
        badges += f'<b class="badge bad">{len(events)} guard event{"s" if len(events) > 1 else ""}</b>'
    body: list[str] = []
    budget = MAX_EPISODE_TOKENS
    for number, sub_trace in enumerate(sub_traces[:MAX_SUB_TRACES]):
        if number:
            arrow = _ARROWS.get(str(sub_traces[number - 1].get("kind")), "next")
            body.append(f'<p class="arrow"><span aria-hidden="true">↓</span> {escape(arrow)}</p>')
        shown = min(MAX_TOKENS, max(budget, 40))
        budget -= min(shown, len(sub_trace.get("tokens", ())))
        body.append(_card(number, sub_trace, colors, shown))
    if len(sub_traces) > MAX_SUB_TRACES:
        body.append(f'<p class="gap">{len(sub_traces) - MAX_SUB_TRACES} later sub-traces left out</p>')
    if events:
        items = "".join(f"<li>{_text(event, 300)}</li>" for event in list(events)[:20])
        body.append(f'<div class="events"><h4>Guard events</h4><ul>{items}</ul></div>')
    name = f"{_text(record.get('episode_id', ''), 80)} · row {_text(record.get('row', ''), 20)}"
    return (
        f'<details class="episode"{" open" if is_open else ""}><summary>{badges}<code>{prompt}</code></summary>'
        f'<p class="name">{name}</p>{"".join(body)}</details>'
    )


def _status_tone(status: str) -> str:
    return {"finished": "plain", "truncated": "warn", "failed": "bad"}.get(status, "plain")


def _card(number: int, sub_trace: Mapping[str, Any], colors: Scale, max_tokens: int) -> str:
    tokens = list(sub_trace.get("tokens", ()))
    kind = str(sub_trace.get("kind", ""))
    actions = sum(1 for token in tokens if token.get("action"))
    left_out = len(tokens) - max_tokens
    head, tail = tokens, []
    if left_out > 0:
        head, tail = tokens[: max_tokens // 2], tokens[len(tokens) - (max_tokens - max_tokens // 2) :]
    rows = _rows(head, colors, starts=True)
    if tail:
        rows += f'<p class="gap">{left_out} tokens left out here</p>{_rows(tail, colors, starts=False)}'
    title = f"Sub-trace {number + 1} · {escape(clean_text(_KINDS.get(kind, kind)))}"
    extra = " inner" if kind == "sub_agent" else ""
    return (
        f'<article class="card{extra}"><h4>{title} <span>{len(tokens)} tokens, {actions} sampled</span></h4>'
        f"{rows}</article>"
    )


def _rows(tokens: Sequence[Mapping[str, Any]], colors: Scale, starts: bool) -> str:
    """Return one row for each run of tokens of one kind: the writer at the left, the text at the right."""
    runs = [
        (kind, list(run))
        for kind, run in groupby(tokens, key=lambda token: (bool(token.get("action")), bool(token.get("summary"))))
    ]
    parts: list[str] = []
    for number, ((action, summary), run) in enumerate(runs):
        before_summary = number + 1 < len(runs) and runs[number + 1][0] == (True, True)
        if action:
            name, style = ("summary", "sum") if summary else ("policy", "pol")
            text = "".join(_action(token, colors) for token in run)
        else:
            name, style = ("task", "task") if starts and number == 0 else ("tool", "tool")
            if summary:
                name, style = "copied summary", "task"
            elif before_summary and name == "tool":
                name = "context"  # tool output, if any, and the request for a summary
            text = "".join(_text(token.get("text", ""), MAX_TOKEN_CHARS) for token in run)
        parts.append(f'<div class="row {style}"><span class="who">{name}</span><pre>{text}</pre></div>')
    return "".join(parts)


def _action(token: Mapping[str, Any], colors: Scale) -> str:
    """Return one sampled token. The page's script reads `data-t`: log-prob, value, advantage, weight version."""
    facts = "|".join(_fact(token.get(name)) for name in ("logprob", "value", "advantage", "version"))
    style = f"{_advantage_class(token.get('advantage'), colors)} {_value_class(token.get('value'), colors)}".strip()
    return f'<i class="{style}" data-t="{facts}">{_text(token.get("text", ""), MAX_TOKEN_CHARS)}</i>'


def _fact(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{float(value):.3g}"


def _advantage_class(value: Any, colors: Scale) -> str:
    if value is None:
        return ""
    level = round(min(1.0, abs(float(value)) / colors.advantage) * NUM_SHADES)
    return "z" if level == 0 else f"{'p' if value > 0 else 'n'}{level}"


def _value_class(value: Any, colors: Scale) -> str:
    if value is None:
        return ""
    share = (float(value) - colors.low) / ((colors.high - colors.low) or 1.0)
    return f"v{round(min(max(share, 0.0), 1.0) * 8)}"


def _text(value: Any, limit: int) -> str:
    """Return escaped text of at most `limit` characters, with visible signs for control characters."""
    text = clean_text(str(value))
    if len(text) > limit:
        text = text[:limit] + "…"
    return escape("".join(char if char >= " " or char in "\n\t" else chr(0x2400 + ord(char)) for char in text))
