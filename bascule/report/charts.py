"""Small charts as inline SVG. Data in, markup out; colours come from the page's CSS classes so that light and dark both work.

Every chart has a title for screen readers and a fixed viewBox, and scales to the page's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 720.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 14.0, 30.0


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), a label for the legend, and a CSS class. `markers` draws dots instead of a line."""

    label: str
    css: str
    points: Sequence[tuple[float, float]]
    markers: bool = False


@dataclass(frozen=True)
class Band:
    """Between the lowest and the highest of several runs: points (x, low, high), drawn in the colour of `css`."""

    css: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x` with a short label."""

    x: float
    label: str
    css: str = "bad"


@dataclass(frozen=True)
class Bar:
    """A stretch of time on one row, in seconds since the run began."""

    row: str
    start_s: float
    end_s: float
    label: str
    css: str


def line_chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    *,
    band: Band | None = None,
    y_min: float | None = None,
    y_max: float | None = None,
    log_y: bool = False,
) -> str:
    """A line chart, or an empty string when there is nothing to draw. `log_y` leaves out values that are not positive."""
    if log_y:
        series = [replace(one, points=_log(one.points)) for one in series]
    points = [point for one in series for point in one.points if math.isfinite(point[1])]
    if not points:
        return ""
    edge = _edge(band) if band else []
    points += edge
    x0, x1 = _range([point[0] for point in points] + [mark.x for mark in marks])
    low, high = _range([point[1] for point in points])
    y0, y1 = (low if y_min is None else y_min), (high if y_max is None else y_max)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        y = TOP + (1 - (min(max(point[1], y0), y1) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM)
        return x, y

    parts = [_axes(x0, x1, y0, y1, x_label, log_y=log_y)]
    for row, mark in enumerate(marks):
        x, _ = place((mark.x, y0))
        anchor = "end" if x > WIDTH * 0.8 else "start"
        shift = -4 if anchor == "end" else 4
        parts.append(
            f'<line class="mark {mark.css}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        parts.append(
            f'<text class="mark-label" x="{x + shift:.1f}" y="{TOP + 10 + 13 * (row % 6)}" text-anchor="{anchor}">{escape(mark.label)}</text>'
        )
    if band and edge:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, edge))
        parts.append(f'<polygon class="band {band.css}" points="{path}"/>')
    for one in series:
        placed = [place(point) for point in one.points if math.isfinite(point[1])]
        if one.markers:
            parts += [
                f'<circle class="dot {one.css}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
                for x, y in placed
            ]
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline class="line {one.css}" points="{path}"/>')
    legend = "".join(f'<span class="key {one.css}">{escape(one.label)}</span>' for one in series)
    return _figure(title, "".join(parts), HEIGHT, legend)


def timeline(title: str, bars: Sequence[Bar], marks: Sequence[Mark], *, total_s: float) -> str:
    """One row a pool: what it did when. Empty string when there is nothing to draw."""
    if not bars or total_s <= 0:
        return ""
    rows = list(dict.fromkeys(bar.row for bar in bars))
    left, row_height = 96.0, 34.0
    height = TOP + row_height * len(rows) + BOTTOM
    scale = (WIDTH - left - RIGHT) / total_s
    parts = []
    for index, row in enumerate(rows):
        y = TOP + index * row_height
        parts.append(
            f'<text class="row" x="{left - 8}" y="{y + 20:.1f}" text-anchor="end">{escape(row)}</text>'
        )
        for bar in (bar for bar in bars if bar.row == row):
            width = max((bar.end_s - bar.start_s) * scale, 1.5)
            parts.append(
                f'<rect class="bar {bar.css}" x="{left + bar.start_s * scale:.1f}" y="{y + 5:.1f}" width="{width:.1f}" height="22" rx="3">'
                f"<title>{escape(bar.label)}: {bar.start_s:.0f} to {bar.end_s:.0f} s</title></rect>"
            )
            if width > 7.0 * len(bar.label):
                parts.append(
                    f'<text class="bar-label" x="{left + bar.start_s * scale + 6:.1f}" y="{y + 20:.1f}">{escape(bar.label)}</text>'
                )
    for mark in marks:
        x = left + mark.x * scale
        parts.append(
            f'<line class="mark {mark.css}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM + 4}"><title>{escape(mark.label)}</title></line>'
        )
    for tick in _ticks(0.0, total_s):
        parts.append(
            f'<text class="tick" x="{left + tick * scale:.1f}" y="{height - 8}" text-anchor="middle">{tick:g} s</text>'
        )
    keys = {bar.css: bar.label for bar in bars}
    legend = "".join(
        f'<span class="key {css}">{escape(label)}</span>' for css, label in keys.items()
    )
    return _figure(title, "".join(parts), height, legend)


def _figure(title: str, body: str, height: float, legend: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )


def _edge(band: Band) -> list[tuple[float, float]]:
    """Once around: along the lows, back along the highs."""
    return [(x, low) for x, low, _ in band.points] + [
        (x, high) for x, _, high in reversed(band.points)
    ]


def _log(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, math.log10(y)) for x, y in points if y > 0]


def _log_ticks(low: float, high: float) -> list[float]:
    """Decimal logarithms of 1, 2 and 5 times powers of ten between 10^low and 10^high."""
    found = [
        math.log10(factor) + power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in (1, 2, 5)
    ]
    return [tick for tick in found if low <= tick <= high]


def _axes(x0: float, x1: float, y0: float, y1: float, x_label: str, *, log_y: bool = False) -> str:
    parts = []
    for tick in _log_ticks(y0, y1) if log_y else _ticks(y0, y1):
        y = TOP + (1 - (tick - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10**tick if log_y else tick:.3g}</text>'
        )
    for tick in _ticks(x0, x1):
        x = LEFT + (tick - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 14}" text-anchor="{_anchor(x)}">{tick:g}</text>'
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _anchor(x: float) -> str:
    """A label in the middle of the right edge would be cut off there."""
    return "end" if x > WIDTH - 2 * RIGHT else "middle"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers between low and high, about `wanted` of them."""
    raw = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]
