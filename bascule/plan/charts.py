"""Charts of the planner's pages, from plain values to HTML that fits a desk and a phone: rows of a name, a track and a value.

On a phone the name stands above its track (`page.html`), places are shares of the track's width and words wrap, so that nothing
has to be scrolled sideways.
"""

from __future__ import annotations

import datetime
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bascule.plan.answer import Estimate, Swing
from bascule.plan.figures import Triple, number

PALETTE = (
    "#2f6fb0",
    "#c8642c",
    "#3f8f6b",
    "#8a5fb0",
    "#b59a2d",
    "#6b7a90",
    "#b04a6a",
    "#3a9aa8",
    "#7c6a4f",
    "#9aa23c",
    "#577399",
    "#a3735c",
)


def color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def interval_bars(rows: Sequence[tuple[str, Estimate]]) -> str:
    """One bar a figure, a whisker for its 80 % interval; what it rests on is shown where the pointer rests."""
    most = max(e.high for _, e in rows) or 1.0
    lines = []
    for i, (name, e) in enumerate(rows):
        value, low, high = (100 * x / most for x in (e.value, e.low, e.high))
        whisker = f"<u style='left:{low:.2f}%;width:{high - low:.2f}%'></u>" if e.value else ""
        track = _part(0, value, color(i)) + whisker
        words = f"{number(e.value)} {e.unit}" if e.value or e.basis else "no public price"
        span = f"80 %: {number(e.low)} to {number(e.high)}" if e.value else ""
        lines.append(_row(name, track, words, span, e.basis))
    return _chart("bars with 80 % intervals", lines)


def stacks(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    unit: str,
    divide: float,
    limit: float | None = None,
) -> str:
    """Stacked bars with a legend; `limit` draws a line (a chip's memory)."""
    keys = list(dict.fromkeys(key for _, parts in rows for key in parts))
    most = max([sum(parts.values()) / divide for _, parts in rows] + [limit or 0.0]) or 1.0
    lines = []
    for name, parts in rows:
        x, track = 0.0, ""
        for index, key in enumerate(keys):
            share = 100 * parts.get(key, 0.0) / divide / most
            if share > 0:
                said = f"{key}: {number(parts[key] / divide)} {unit}"
                track += _part(x, share, color(index), said)
                x += share
        if limit:
            track += _line(100 * limit / most, "limit")
        lines.append(_row(name, track, f"{number(sum(parts.values()) / divide)} {unit}"))
    legend = [(_square(color(index)), key) for index, key in enumerate(keys)]
    if limit:
        legend.append(("<s class='limit'></s>", f"the chip's {number(limit)} {unit}"))
    return _chart("stacked bars", lines) + _legend(legend)


@dataclass(frozen=True)
class Finish:
    """When an option is done: days from the start (middle, low, high), and the same as dates."""

    name: str
    days: Triple
    dates: tuple[datetime.date, datetime.date, datetime.date]


DATES = 3  # under a calendar: as many as a phone's width holds side by side


def calendar(options: Sequence[Finish], start: datetime.date, longest: float) -> str:
    """From the start to the finish, the 80 % spread of the finish shaded; days after `longest` are cut off."""
    most = min(max(one.days[2] for one in options), longest) or 1.0
    step = max(1, math.ceil(most / DATES))
    marks = [day for day in range(0, math.ceil(most), step) if day <= 0.85 * most]
    grid = "".join(_line(100 * day / most, "axis") for day in marks)
    lines = []
    for i, one in enumerate(options):
        value, low, high = (100 * min(x, most) / most for x in one.days)
        finish, early, late = (f"{date:%d %b %Y}" for date in one.dates)
        track = grid + _part(0, low, color(i)) + _line(value, "axis")
        track += _part(low, high - low, color(i), f"finish between {early} and {late}", faint=True)
        lines.append(_row(one.name, track, finish, f"80 %: {early} to {late}"))
    dates = "".join(
        f"<span class='tick' style='left:{100 * day / most:.2f}%'>{start + datetime.timedelta(days=day):%d %b %y}</span>"
        for day in marks
    )
    lines.append(f"<div class='bar'><span></span><div class='ticks'>{dates}</div><span></span></div>")  # fmt: skip
    return _chart("calendar with finish dates", lines)


def tornado(swings: Sequence[Swing], asked: float) -> str:
    """Each assumption's swing of a ratio on a logarithmic axis, with the lines at 1, where the answer turns, and at `asked`."""
    low = min([one.low for one in swings] + [0.9, asked])
    high = max([one.high for one in swings] + [1.1, asked])

    def at(value: float) -> float:
        return 100 * math.log(value / low) / math.log(high / low)

    lines = []
    for one in swings:
        words = f"{one.low:.2f}x to {one.high:.2f}x"
        track = _part(at(one.low), at(one.high) - at(one.low), color(one.turns), words)
        track += _line(at(1.0), "even") + _line(at(asked), "asked")
        lines.append(_row(one.assumption, track, words))
    legend = [
        ("<s class='even'></s>", "same cost (1.00x)"),
        ("<s class='asked'></s>", f"as asked, {asked:.2f}x"),
    ]
    return _chart("sensitivity", lines) + _legend(legend)


def roofline(points: Mapping[str, float], peak: float, bandwidth: float, peak_words: str) -> str:
    """Rate against FLOPs per byte, both logarithmic: the chip's roof, and on it the model's operators by their intensity."""
    low, high = 1.0, 1.5 * max([4e3, *points.values()])
    ridge = peak / bandwidth

    def across(intensity: float) -> float:
        return 100 * math.log(max(intensity, low) / low) / math.log(high / low)

    def down(rate: float) -> float:
        share = math.log(rate / (bandwidth * low)) / math.log(peak / (bandwidth * low))
        return 94 - 84 * max(0.0, min(1.0, share))

    roof = f"M0 94L{across(ridge):.2f} 10H100"
    drawn = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none"><path d="{roof}" fill="none" stroke="currentColor" stroke-width="2" vector-effect="non-scaling-stroke"/></svg>'
    marks = "".join(
        f"<b style='left:{across(x):.2f}%;top:{down(min(peak, bandwidth * x)):.2f}%;background:{color(i)}' title='{html.escape(name, quote=True)}'></b>"
        for i, (name, x) in enumerate(points.items())
    )
    decades = [10.0**k for k in range(int(math.log10(high)) + 1)]
    ticks = "".join(
        f"<span class='tick' style='left:{across(x):.2f}%'>{x:,.0f}</span>" for x in decades
    )
    legend = [(_square(color(i)), f"{name} ({x:.2g} FLOP/B)" if x < 10 else f"{name} ({x:,.0f} FLOP/B)") for i, (name, x) in enumerate(points.items())]  # fmt: skip
    legend.append(("", f"ridge {ridge:,.0f} FLOP/B"))
    return (
        f"<div role='img' aria-label='roofline'><div class='soft roofed'>{html.escape(peak_words)}</div>"
        f"<div class='roof'>{drawn}{marks}</div><div class='ticks'>{ticks}</div></div>{_legend(legend)}"
    )


def _row(name: str, track: str, words: str, span: str = "", basis: str = "") -> str:
    soft = f" <span class='soft'>{html.escape(span)}</span>" if span else ""
    title = f" title='{html.escape(basis, quote=True)}'" if basis else ""
    return f"<div class='bar'><span>{html.escape(name)}</span><div class='track'{title}>{track}</div><span>{html.escape(words)}{soft}</span></div>"


def _part(left: float, width: float, fill: str, title: str = "", *, faint: bool = False) -> str:
    look = f"left:{left:.2f}%;width:{max(0.0, width):.2f}%;background:{fill}" + (
        ";opacity:.35" if faint else ""
    )
    return f"<i style='{look}' title='{html.escape(title, quote=True)}'></i>"


def _line(left: float, kind: str) -> str:
    return f"<s class='{kind}' style='left:{left:.2f}%'></s>"


def _square(fill: str) -> str:
    return f"<i style='background:{fill}'></i>"


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    return f"<div class='legend'>{''.join(f'<span>{mark}{html.escape(words)}</span>' for mark, words in entries)}</div>"


def _chart(label: str, lines: Sequence[str]) -> str:
    return f"<div role='img' aria-label='{html.escape(label, quote=True)}'>{''.join(lines)}</div>"
