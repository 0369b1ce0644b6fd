"""The three drawings of a qualification's page, as inline SVG: bars on a logarithmic scale, a roofline, bands of losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bascule.report.charts import Series, line_chart

WIDTH, LEFT, RIGHT, ROW = 720.0, 230.0, 76.0, 24.0


@dataclass(frozen=True)
class Bar:
    """One row. `css` is `good`, `bad` or `a`; `word` stands at the bar's end."""

    label: str
    value: float
    word: str
    css: str = "a"


def bars(title: str, rows: Sequence[Bar], *, log: bool = False, limit: float | None = None) -> str:
    """Horizontal bars, the longest first as given. `limit` draws the bar that may not be passed. Empty string without rows."""
    if not rows:
        return ""
    values = [row.value for row in rows if row.value > 0] + ([limit] if limit else [])
    low = min(values, default=1.0) / 2 if log else 0.0
    high = max(values, default=1.0)
    height = ROW * len(rows) + (22.0 if limit else 6.0)

    def x(value: float) -> float:
        if log:
            share = math.log(max(value, low) / low) / max(math.log(high / low), 1e-9)
        else:
            share = value / max(high, 1e-12)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    parts = []
    for place, row in enumerate(rows):
        y = place * ROW
        parts.append(
            f'<text class="row" x="{LEFT - 8}" y="{y + 16:.0f}" text-anchor="end">{escape(row.label)}</text>'
            f'<rect class="bar {row.css}" x="{LEFT}" y="{y + 4:.0f}" width="{max(x(row.value) - LEFT, 2):.1f}" height="{ROW - 8:.0f}" rx="3"/>'
            f'<text class="tick" x="{x(row.value) + 6:.1f}" y="{y + 16:.0f}">{escape(row.word)}</text>'
        )
    if limit:
        at, bottom = x(limit), ROW * len(rows)
        parts.append(
            f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{bottom:.0f}"/>'
            f'<text class="mark-label" x="{at:.1f}" y="{bottom + 14:.0f}" text-anchor="middle">allowed {limit:g}</text>'
        )
    return _figure(title, "".join(parts), height)


def roofline(
    title: str,
    products: Sequence[tuple[int, float, float]],
    memory_gb_per_s: float,
    datasheet: tuple[str, float | None, float | None] | None,
) -> str:
    """Rate against intensity, both logarithmic. `products`: (size, FLOP per byte, GFLOP/s); `datasheet`: (chip, TFLOP/s, TB/s)."""
    top = max(rate for _, _, rate in products)
    roofs = [("measured", top, memory_gb_per_s, "a")]
    if datasheet and datasheet[1] and datasheet[2]:
        roofs.append((f"datasheet {datasheet[0]}", 1000 * datasheet[1], 1000 * datasheet[2], "c"))
    intensities = (
        [one[1] for one in products] + [0.25] + [peak / bytes_ for _, peak, bytes_, _ in roofs]
    )
    x0, x1 = math.log10(min(intensities)), math.log10(max(intensities) * 4)
    rates = [rate for _, _, rate in products] + [peak for _, peak, _, _ in roofs]
    y0 = math.log10(min(min(rates), 0.25 * memory_gb_per_s)) - 0.1
    y1 = math.log10(max(rates)) + 0.25
    left, right, top_y, bottom, height = 62.0, 16.0, 12.0, 34.0, 250.0

    def place(intensity: float, rate: float) -> tuple[float, float]:
        across = (math.log10(intensity) - x0) / (x1 - x0)
        up = (math.log10(rate) - y0) / (y1 - y0)
        return left + across * (WIDTH - left - right), top_y + (1 - up) * (height - top_y - bottom)

    parts = []
    for power in range(math.ceil(y0), math.floor(y1) + 1):
        _, y = place(10**x0, 10.0**power)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    for power in range(math.ceil(x0), math.floor(x1) + 1):
        x, _ = place(10.0**power, 10**y0)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 16}" text-anchor="middle">{10.0**power:g}</text>'
        )
    for _, peak, speed, css in roofs:
        path = [
            place(10**x0, max(speed * 10**x0, 10**y0)),
            place(peak / speed, peak),
            place(10**x1, peak),
        ]
        parts.append(
            f'<polyline class="line {css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in path)}"/>'
        )
    for size, intensity, rate in products:
        x, y = place(intensity, rate)
        parts.append(
            f'<circle class="dot b" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{size}: {rate:.1f} GFLOP/s</title></circle>'
        )
        parts.append(f'<text class="tick" x="{x + 8:.1f}" y="{y + 12:.1f}">{size}³</text>')
    parts.append(
        f'<text class="tick" x="{WIDTH - right}" y="{height - 2}" text-anchor="end">FLOP per byte moved</text>'
    )
    parts.append(f'<text class="tick" x="{left + 4}" y="{top_y + 2}">GFLOP/s</text>')
    legend = "".join(f'<span class="key {css}">{escape(name)}</span>' for name, _, _, css in roofs)
    return _figure(title, "".join(parts), height, legend + '<span class="key b">products</span>')


def losses(title: str, here: Sequence[Sequence[float]], there: Sequence[Sequence[float]]) -> str:
    """Every paired training's losses, the reference's drawn over the chip's."""
    lines = [
        Series(
            name if place == 0 else "",
            css,
            [(float(step), value) for step, value in enumerate(run, start=1)],
        )
        for name, css, runs in (("chip", "bad", here), ("reference", "b", there))
        for place, run in enumerate(runs)
    ]
    return (
        line_chart(title, "step", lines, log_y=True)
        .replace('<span class="key bad"></span>', "")
        .replace('<span class="key b"></span>', "")
    )


def _figure(title: str, body: str, height: float, legend: str = "") -> str:
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )
