"""Curves as inline SVG: text stays text, colors come from the page's CSS, nothing is fetched.

A chart is a pure function of its numbers. What the pointer or the arrow keys show is put into `data-hover`, which the
page's script reads; without the script the picture is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

MAX_POINTS = 360  # of a series; longer ones are averaged into this many buckets

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One curve: (step, value) in the order of steps, or of the quantity that the chart's x_name names.

    `errors` are half-widths of the band around it, one a point.
    """

    name: str
    points: Points
    color: int = 0  # CSS class c0..c7
    errors: Sequence[float] = ()
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart's data. `bounds` are those of the value axis; None: determined by the data and zero."""

    title: str
    series: Sequence[Series]
    note: str = ""
    bounds: tuple[float, float] | None = None
    log: bool = False
    form: Callable[[float], str] = field(default=lambda value: short(value))
    stacked: bool = False
    x_name: str = "step"


@dataclass(frozen=True)
class _Axes:
    """The scales of a chart: `x` and `y` map data to viewBox units."""

    width: int
    height: int
    low_x: float
    high_x: float
    low_y: float
    high_y: float
    log: bool

    left = 52
    right = 14
    top = 10
    bottom = 26

    def x(self, step: float) -> float:
        span = (self.high_x - self.low_x) or 1.0
        return self.left + (step - self.low_x) / span * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.low_y, self.high_y
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, self.low_y))
        share = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def short(value: float) -> str:
    """Return a number in a few characters: 0.412, 1.2e-05, 12.4k."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %" if 0 < abs(value) < 0.1 else f"{100 * value:.0f} %"


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most `limit` points: means of equal buckets, each at its last step; short series stay as they are."""
    if len(points) <= limit:
        return list(points)
    edges = [index * len(points) // limit for index in range(limit + 1)]
    buckets = [points[edges[index] : edges[index + 1]] for index in range(limit)]
    return [(bucket[-1][0], sum(value for _, value in bucket) / len(bucket)) for bucket in buckets]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return round values (1, 2 or 5 times a power of ten) that lie in [low, high], about `wanted` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def figure(chart: Chart, wide: bool = False) -> str:
    """Return the chart as an HTML <figure>; a `wide` one includes a narrow picture for phones."""
    kept = [series for series in chart.series if series.points]
    if not kept:
        return ""
    pictures = svg(chart, 430, 240)
    if wide:
        pictures = f'<div class="on-wide">{svg(chart, 980, 300)}</div><div class="on-slim">{pictures}</div>'
    legend = ""
    if len(kept) > 1:
        marks = ['<i class="faint"></i>' if series.faint else "<i></i>" for series in kept]
        names = [
            f'<li class="c{one.color}">{mark}{escape(one.name)}</li>' for one, mark in zip(kept, marks, strict=True)
        ]
        legend = '<ul class="legend">' + "".join(names) + "</ul>"
    note = f"<p>{escape(chart.note)}</p>" if chart.note else ""
    size = ("wide" if wide else "small") + (" stack" if chart.stacked else "")
    return (
        f'<figure class="chart {size}"><figcaption><h3>{escape(chart.title)}</h3>{note}</figcaption>'
        f"{legend}{pictures}</figure>"
    )


def svg(chart: Chart, width: int, height: int) -> str:
    """Return the picture alone: grid, axes, curves, a crosshair, and a description for screen readers."""
    series = [_thinned(one) for one in chart.series if one.points]
    layers = _stack(series) if chart.stacked else [list(one.points) for one in series]
    axes = _axes(chart, series, layers, width, height)
    parts = [_grid(axes, chart)]
    if chart.stacked:
        parts += _areas(axes, series, layers)
    else:
        parts += [_curve(axes, one) for one in series]
    parts.append(f'<line class="cross" y1="{axes.top}" y2="{height - axes.bottom}" visibility="hidden"/>')
    hover = escape(json.dumps(_hover(axes, chart, series), separators=(",", ":")), quote=True)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" tabindex="0" aria-label="{escape(_spoken(chart, series))}" '
        f'data-hover="{hover}">{"".join(parts)}</svg>'
    )


def _thinned(series: Series) -> Series:
    if len(series.points) <= MAX_POINTS:
        return series
    steps = [step for step, _ in series.points]
    errors = thin(list(zip(steps, series.errors, strict=True))) if series.errors else []
    return Series(
        series.name, thin(series.points), series.color, [error for _, error in errors], series.dots, series.faint
    )


def _stack(series: Sequence[Series]) -> list[list[tuple[float, float]]]:
    """Return the cumulative tops of the layers. A series without a value at a step adds nothing there."""
    steps = sorted({step for one in series for step, _ in one.points})
    tops: list[list[tuple[float, float]]] = []
    height = dict.fromkeys(steps, 0.0)
    for one in series:
        values = dict(one.points)
        height = {step: height[step] + values.get(step, 0.0) for step in steps}
        tops.append(sorted(height.items()))
    return tops


def _axes(chart: Chart, series: Sequence[Series], layers: Sequence[Points], width: int, height: int) -> _Axes:
    steps = [step for points in layers for step, _ in points]
    values = [value for points in layers for _, value in points]
    for one in series:
        for (_, value), error in zip(one.points, one.errors, strict=False):
            values += [value - error, value + error]
    if chart.bounds is not None:
        low, high = chart.bounds
    elif chart.log:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = 10.0 ** math.floor(math.log10(min(positive))), 10.0 ** math.ceil(math.log10(max(positive)))
        high = high if high > low else low * 10
    else:
        low, high = min(0.0, *values), max(0.0, *values)
        pad = 0.06 * ((high - low) or 1.0)
        low, high = (low - pad if low < 0 else 0.0), (high + pad if high > 0 or low == 0 else 0.0)
    margin = 0.5 if chart.stacked else 0.0  # room for the outermost bars
    return _Axes(width, height, min(steps) - margin, max(steps) + margin, low, high, chart.log)


def _grid(axes: _Axes, chart: Chart) -> str:
    parts: list[str] = []
    if axes.log:
        first, last = round(math.log10(axes.low_y)), round(math.log10(axes.high_y))
        stride = max(1, (last - first) // 4)
        marks = [10.0**power for power in range(first, last + 1, stride)]
    else:
        marks = ticks(axes.low_y, axes.high_y, 5)
    for mark in marks:
        y = axes.y(mark)
        parts.append(f'<line class="grid" x1="{axes.left}" x2="{axes.width - axes.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{axes.left - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(chart.form(mark))}</text>')
    for mark in ticks(axes.low_x, axes.high_x, 9 if axes.width > 600 else 5):
        if mark == int(mark):
            place = f'x="{axes.x(mark):.1f}" y="{axes.height - 7}"'
            parts.append(f'<text {place} text-anchor="middle">{mark:.0f}</text>')
    parts.append(f'<text x="{axes.left - 9}" y="{axes.height - 7}" text-anchor="end">{escape(chart.x_name)}</text>')
    return "".join(parts)


def _curve(axes: _Axes, series: Series) -> str:
    places = [(axes.x(step), axes.y(value)) for step, value in series.points]
    parts: list[str] = []
    if series.errors:
        pairs = list(zip(series.points, series.errors, strict=True))
        upper = [f"{axes.x(step):.1f},{axes.y(value + error):.1f}" for (step, value), error in pairs]
        lower = [f"{axes.x(step):.1f},{axes.y(value - error):.1f}" for (step, value), error in reversed(pairs)]
        parts.append(f'<polygon class="band c{series.color}" points="{" ".join(upper + lower)}"/>')
    style = f"line c{series.color}{' faint' if series.faint else ''}"
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline class="{style}" points="{line}"/>')
    if series.dots or len(places) == 1:
        parts += [f'<circle class="dot c{series.color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return "".join(parts)


def _areas(axes: _Axes, series: Sequence[Series], layers: Sequence[Points]) -> list[str]:
    """Return the layers, each on top of the one before: as bars if there is room, or as areas for many steps."""
    floor = [(step, 0.0) for step, _ in layers[0]]
    half = 0.4 * (axes.x(1) - axes.x(0))
    parts = []
    for one, top in zip(series, layers, strict=True):
        if half >= 1.5:
            pairs = zip(top, floor, strict=True)
            shapes = [
                f"M{axes.x(step) - half:.1f} {axes.y(low):.1f}V{axes.y(high):.1f}"
                f"H{axes.x(step) + half:.1f}V{axes.y(low):.1f}z"
                for (step, high), (_, low) in pairs
                if high > low
            ]
            parts.append(f'<path class="area c{one.color}" d="{"".join(shapes)}"/>')
        else:
            edge = [f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in (*top, *reversed(floor))]
            parts.append(f'<polygon class="area c{one.color}" points="{" ".join(edge)}"/>')
        floor = list(top)
    return parts


def _hover(axes: _Axes, chart: Chart, series: Sequence[Series]) -> dict[str, object]:
    """Return the data of the page's script: viewBox x and text of each step."""
    texts: dict[float, list[str]] = {}
    for one in series:
        errors = one.errors or [0.0] * len(one.points)
        for (step, value), error in zip(one.points, errors, strict=True):
            spread = f" ± {chart.form(error)}" if error else ""
            texts.setdefault(step, []).append(f"{one.name}: {chart.form(value)}{spread}")
    steps = sorted(texts)
    return {
        "w": axes.width,
        "x": [round(axes.x(step), 1) for step in steps],
        "t": [f"{chart.x_name} {step:.0f}\n" + "\n".join(texts[step]) for step in steps],
    }


def _spoken(chart: Chart, series: Sequence[Series]) -> str:
    """Describe each series of the chart in a sentence: first, last, smallest and largest value."""
    parts = [f"{chart.title}."]
    for one in series:
        values = [value for _, value in one.points]
        first, last = one.points[0], one.points[-1]
        parts.append(
            f"{one.name}: {chart.form(first[1])} at {chart.x_name} {first[0]:.0f}, "
            f"{chart.form(last[1])} at {chart.x_name} {last[0]:.0f}, "
            f"between {chart.form(min(values))} and {chart.form(max(values))}."
        )
    return " ".join(parts)


_LIGHT = ("#0072b2", "#c25700", "#00805c", "#a8527f", "#7a5fb5", "#6b7785", "#a08000")
_DARK = ("#56b4e9", "#f0a040", "#3ecf9f", "#e79bc6", "#b9a5f0", "#a7b2bf", "#e0d060")


def _colors(shades: Sequence[str]) -> str:
    return "".join(f".c{number}{{color:{shade}}}" for number, shade in enumerate(shades))


_CURVE_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#57606a}.title{font-weight:600;font-size:16px;fill:#1f2328}"
    ".grid{stroke:#d0d7de}.line{fill:none;stroke:currentColor;stroke-width:2.5;stroke-linejoin:round}"
    f".band{{fill:currentColor;opacity:.18}}.dot{{fill:currentColor}}{_colors(_LIGHT)}"
    ".cross{display:none}.ground{fill:#ffffff}"
    "@media(prefers-color-scheme:dark){text{fill:#9198a1}.title{fill:#f0f6fc}.grid{stroke:#3d444d}"
    f"{_colors(_DARK)}.ground{{fill:#0d1117}}}}"
)
_LEGEND_WIDTH = 230


def standalone(chart: Chart, width: int = 760, height: int = 320) -> str:
    """Return the chart as a standalone SVG file with a title, light or dark like the reader's screen.

    Several curves are named on the right, in the order of their last values.
    """
    kept = [one for one in chart.series if one.points]
    picture = svg(chart, width, height)
    body = picture[picture.index(">") + 1 : picture.rindex("</svg>")]
    full = width
    if len(kept) > 1:
        full += _LEGEND_WIDTH
        for row, one in enumerate(sorted(kept, key=lambda one: -one.points[-1][1])):
            y = 24 + 24 * row
            body += f'<line class="line c{one.color}" x1="{width + 8}" x2="{width + 30}" y1="{y - 4}" y2="{y - 4}"/>'
            body += f'<text x="{width + 38}" y="{y}">{escape(one.name)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -34 {full + 16} {height + 40}" role="img" '
        f'aria-label="{escape(_spoken(chart, kept))}"><style>{_CURVE_STYLE}</style>'
        f'<rect class="ground" x="-10" y="-34" width="{full + 16}" height="{height + 40}" rx="8"/>'
        f'<text class="title" x="14" y="-12">{escape(chart.title)}</text>{body}'
        "</svg>\n"
    )
