"""A speed that the user measured, in words: `410 tokens/s/chip`, `840k tokens/s in all`, `12.5 s a step`, `decode 1,850 tokens/s/chip`.

Whether it counts one chip or all, and for a service what it counts, is asked for, never guessed: the answers differ by factors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from bascule.errors import RecipeError

NUM = r"(?:\d[\d,]*\.?\d*|\.\d+)"
MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
Of = Literal["train", "decode", "prefill", "both"]
# What a user may call the tokens that a service's rate counts.
COUNTED: dict[str, Of] = {
    "decode": "decode",
    "decoding": "decode",
    "prefill": "prefill",
    "mixed": "both",
}
TRAINED = "'410 tokens/s/chip', '840k tokens/s in all' or '12.5 s a step'"
SERVED = "'decode 1850 tokens/s/chip', 'prefill 9k tokens/s/chip', or 'mixed 900 tokens/s/chip' (completions, where prompts share the chips)"


@dataclass(frozen=True)
class Speed:
    """`value` in `unit`: tokens a second and chip, tokens a second of all chips, or seconds of a step."""

    text: str
    value: float
    unit: Literal["tokens/s/chip", "tokens/s in all", "s a step"]
    of: Of = "train"

    def per_chip(self, chips: int, tokens_per_step: float | None = None) -> float:
        """Tokens a second and chip of a run on `chips`. Raises RecipeError where a step's time is given without its batch."""
        if self.unit == "tokens/s/chip":
            return self.value
        if self.unit == "tokens/s in all":
            return self.value / chips
        if tokens_per_step is None:
            raise RecipeError(
                f"'{self.text}' says nothing without the batch of that step; add for instance 'batch 1024' (sequences)."
            )
        return tokens_per_step / chips / self.value


def speed_of(part: str, *, serving: bool = False) -> Speed | None:
    """The speed that a part of a question states; None when it is about something else. Raises RecipeError where its unit is
    missing or can be read in two ways."""
    word = re.sub(r"^measured\s+", "", part.strip().lower())
    meant = (
        word != part.strip().lower()
        or re.search(
            r"\btok\w*\s*(?:/|per\b)|\b(?:a|per)\s+step\b|/\s*step\b|\bmfu\b|flops\b", word
        )
        is not None
    )
    if not meant:
        return None
    if re.search(r"-\s*\d", word):
        raise RecipeError(f"'{part}': a measured speed must be above 0.")
    if re.search(r"\bmfu\b|flops\b|%", word):
        raise RecipeError(
            f"'{part}': shares of a peak are counted in ways that differ by up to 1.6x; give {SERVED if serving else TRAINED}."
        )
    return _served(part, word) if serving else _trained(part, word)


def _trained(part: str, word: str) -> Speed:
    if found := re.fullmatch(
        rf"({NUM})\s*(ms|s|sec|seconds?|min|minutes?)\s*(?:/|a\b|per\b)\s*step", word
    ):
        unit = {"ms": 1e-3, "min": 60.0}.get(found[2][:3] if found[2] != "ms" else "ms", 1.0)
        return Speed(part, _positive(part, found[1]) * unit, "s a step")
    after, value = _rate(part, word, TRAINED)
    if re.fullmatch(PER_CHIP, after):
        return Speed(part, value, "tokens/s/chip")
    if re.fullmatch(r"in all|in total|total|altogether|(?:of |on |over )?all(?: chips)?", after):
        return Speed(part, value, "tokens/s in all")
    amount = word.split("tok")[0].strip()
    raise RecipeError(
        f"'{part}' does not say whether of one chip or of all; write '{amount} tokens/s/chip' or '{amount} tokens/s in all'."
    )


PER_CHIP = r"(?:/|per\b|a\b|each)\s*(?:chip|gpu|npu|tpu|card|device|accelerator|die)?"


def _served(part: str, word: str) -> Speed:
    names = "|".join(COUNTED)
    kinds = re.findall(rf"\b({names})\b", word)
    if len(kinds) != 1:
        raise RecipeError(f"'{part}' does not say which tokens it counts; write {SERVED}.")
    rest = re.sub(rf"\b({names})\b", "", word).strip()
    after, value = _rate(part, rest, SERVED)
    if not re.fullmatch(PER_CHIP, after):
        raise RecipeError(
            f"'{part}': give the rate of one chip, of those that do this work; write {SERVED}."
        )
    return Speed(part, value, "tokens/s/chip", COUNTED[kinds[0]])


def _rate(part: str, word: str, allowed: str) -> tuple[str, float]:
    """(what follows `tokens/s`, the number in front of it)."""
    found = re.fullmatch(
        rf"({NUM}\s*[kmb]?)\s*tok(?:en)?s?\s*(?:/|per)\s*s(?:ec|econd)?\b\s*(.*)", word
    )
    if not found:
        raise RecipeError(f"'{part}': the measured speed needs its unit; write {allowed}.")
    return found[2].strip(), _positive(part, found[1])


def _positive(part: str, text: str) -> float:
    found = re.fullmatch(rf"({NUM})\s*([kmb]?)", text.strip())
    value = float(found[1].replace(",", "")) * MULTIPLES[found[2]] if found else 0.0
    if value <= 0:
        raise RecipeError(f"'{part}': a measured speed must be above 0.")
    return value
