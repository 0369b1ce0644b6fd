"""The parts of a question between its commas: split, read as numbers with their units, and refused where they cannot be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from bascule.errors import RecipeError, nearest
from bascule.plan.speed import MULTIPLES

Ask = TypeVar("Ask")  # a frozen dataclass: TrainAsk or ServeAsk
NUM = r"(?:\d+\.?\d*|\.\d+)"
POWER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?e\+?\d{1,2}(?![\w.])", re.IGNORECASE)
# Of tokens only, or of nothing: `1 million in` could be 1,000,000 or the 1,048,576 of a context of 1M.
WORDED = re.compile(r"(?<=\d)\s*(million|billion|trillion)(?=\s+tokens?\b|\s*(?:$|[,;]))", re.IGNORECASE)  # fmt: skip


def quantity(text: str) -> float | None:
    """`14.8T`, `4k`, `15,360` as a number; None when it is not one. `4k` counts 1024 each only in token lengths."""
    found = re.fullmatch(r"([\d,]*\.?\d+)\s*([kmbt]?)", text.strip().lower())
    return float(found.group(1).replace(",", "")) * MULTIPLES[found.group(2)] if found else None


def length(text: str) -> float | None:
    """A token length: `4k` is 4096, `1M` 1048576, `131072` itself."""
    found = re.fullmatch(r"(\d*\.?\d+)\s*([km])", text.strip().lower())
    if found:
        return round(float(found.group(1)) * (1024 if found.group(2) == "k" else 1024**2))
    return quantity(text)


def parts_of(text: str) -> list[str]:
    """What stands between the commas (or semicolons, in either script), at least one part; the comma of `6,144 x H800` or
    `batch 15,360` groups digits, `15e12` is written out and `15 trillion tokens` is `15T tokens`."""
    ungrouped = re.sub(
        r"(?<![\w.])\d{1,3}(?:,\d{3})+(?!\d)", lambda found: found[0].replace(",", ""), text
    )
    ungrouped = POWER.sub(lambda found: f"{float(found[0]):.0f}", ungrouped)
    ungrouped = WORDED.sub(lambda found: found[1][0].upper(), ungrouped)
    return [part.strip() for part in re.split("[,;，；、]", ungrouped) if part.strip()] or [""]


def taken(
    ask: Ask, parts: Sequence[str], take: Callable[[Ask, str], Ask], unsaid: Mapping[str, Any]
) -> Ask:
    """The question with all its parts. `unsaid`: a value of each field that no part can say. Two parts that say the same
    differently are refused: which of them was meant is anyone's guess."""
    blank: Ask = replace(ask, **unsaid)  # type: ignore[type-var]
    said: dict[str, str] = {}
    for part in parts:
        told = take(blank, part)
        for name in (name for name in unsaid if getattr(told, name) != getattr(blank, name)):
            before = said.setdefault(name, part)
            if getattr(take(blank, before), name) != getattr(told, name):
                raise RecipeError(
                    f"'{before}' and '{part}' say the same differently; keep one of them."
                )
        ask = take(ask, part)
    return ask


def whole(part: str, value: float | None) -> int:
    """A count above 0 without a fraction."""
    found = above_0(part, value)
    if found != int(found):
        raise RecipeError(f"'{part}': a whole number above 0 is allowed.")
    return int(found)


def above_0(part: str, value: float | None) -> float:
    if not value or value < 0:
        raise RecipeError(f"'{part}': the number must be above 0.")
    return value


def price_of(part: str) -> float | None:
    found = re.fullmatch(
        rf"((?:us)?[$€£¥]?)\s*(-?{NUM})\s*([a-z$€£¥]*)\s*(?:/|\bper\b)\s*(?:chip-?)?h(?:r|our)?",
        part.lower(),
    )
    if not found:
        return None
    before, value, after = found.groups()
    if not before and not after:
        raise RecipeError(f"'{part}' has no currency; write for instance '{value} USD/h'.")
    if not {before, after} <= {"", "usd", "$", "us$"}:
        raise RecipeError(
            f"'{part}': give the price in USD/h (the planner holds no exchange rate)."
        )
    if float(value) < 0:
        raise RecipeError(
            f"'{part}': a price cannot be negative; 0 or more USD per chip and hour is allowed."
        )
    return float(value)


def pue_of(text: str) -> float:
    value = float(text)
    if not 1.0 <= value <= 3.0:
        raise RecipeError(
            f"PUE {value} is out of range; 1.0 to 3.0 is allowed (facility power over machine power)."
        )
    return value


def not_understood(part: str, allowed: list[str]) -> RecipeError:
    if re.search(r"(?<!\w)-\s*\.?\d", part):
        return RecipeError(f"'{part}': the number must be above 0.")
    return RecipeError(
        f"'{part}' is not understood; allowed: {'; '.join(allowed)}.{nearest(part.lower(), allowed)}"
    )
