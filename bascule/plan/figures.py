"""Figures in words."""

from __future__ import annotations

import math

Triple = tuple[float, float, float]  # middle, and the ends of the 80 % interval


def number(value: float, digits: int = 3) -> str:
    """Rounded to three significant digits, thousands separated, no exponent from a thousandth up."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    return f"{rounded:,.0f}" if places <= 0 else f"{rounded:.{places}f}"


def count(value: float) -> str:
    """A number of parameters with one decimal: `682.6 G`, `457.7 k`."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value / 1e3:,.1f} k"


def tokens(value: float) -> str:
    """Tokens as people ask for them: `14.80 T tokens`, `500.0 B tokens`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{number(value / size, 4)} {unit} tokens"
    return f"{value:,.0f} tokens"


def moved(before: Triple, now: Triple) -> str:
    """What the user's own runs did to a forecast: how far it went, and what became of its interval."""
    factor = math.log(before[2] / before[1]) / math.log(now[2] / now[1])
    change = now[0] / before[0] - 1
    width = "as wide as before"
    if abs(math.log(factor)) > 0.05:
        times, word = (factor, "narrower") if factor > 1 else (1 / factor, "wider")
        width = f"{times:.1f} times {word}"
    return f"{change:+.1%}".replace("%", " %") + f", interval {width}"
