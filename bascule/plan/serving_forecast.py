"""The physics of serving, corrected by the published points nearest to a question, with an 80 % interval: what forecast.py is
to training."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from bascule.plan.models import model_word
from bascule.plan.regress import OWN, Point, Process, Term
from bascule.plan.serving import (
    SERVE_NAMES,
    SERVE_PRIOR_SD,
    SOFTWARE_TODAY,
    ServeConstants,
    Serving,
    chosen_batch,
    rate,
    step_s,
    token_s,
)

# No level of a chip, a model or a software by itself: what points of one table share is mostly that table's habit, and taught as a
# property of its chip it misled every other table (papers left out: mean logarithm 0.298 with such levels, 0.273 without).
SERVE_TERMS = (
    Term(()),
    Term(("vendor",)),
    Term(("kind",)),
    Term((), "near"),
    Term(("chip", "model"), "near"),
    Term(("chip", "model", "software"), "near"),
)
SERVE_NUMBERS = (
    "log2 batch",
    "log2 prompt",
    "log2 completion",
    "log2 chips",
    "log2 active",
    "log2 token time",
    "memory share",
    "software year",
)


OWN_NOISE = 0.3  # of a published point's: what is left in a service that its owner measured
STEP = 0.2  # a secant: near a latency limit the tangent of a rate is steeper than any change that is meant
STEEPEST = 1.0  # a rate moves with a constant by its own share at most; what a limit adds to that is no property of the chip


def serve_point(
    p: Serving,
    c: ServeConstants,
    *,
    target: str = "rate",
    family: str = "",
    name: str = "",
    noise: float = 1.0,
) -> Point:
    numbers, slopes = _measures(p, c, target)
    words = {
        "vendor": p.chip.vendor,
        "chip": p.chip.kind,
        "model": model_word(p.shape.name),
        "software": p.software,
        "kind": p.phase,
        "style": "split" if p.split else "tensor",
    }
    return Point(words, numbers, slopes, family, name, noise, p.software_date - SOFTWARE_TODAY)


@functools.lru_cache(maxsize=2048)
def _measures(
    p: Serving, c: ServeConstants, target: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A point's numbers, and its slopes along the constants. Kept: a score asks for each of its rows several times."""
    batch = chosen_batch(p, c) if p.phase != "prefill" else 64.0
    parts = step_s(p, c, batch)
    numbers = (
        math.log2(max(batch, 0.01)),
        math.log2(max(1.0, p.prompt)),
        math.log2(max(1.0, p.completion)),
        math.log2(max(1, p.chips)),
        math.log2(p.shape.active_weights),
        math.log2(token_s(p, c, batch)),
        (parts["weights"] + parts["cache"]) / sum(parts.values()),
        p.software_date,
    )
    return numbers, serve_slopes(p, c, target)


def serve_slopes(
    p: Serving, c: ServeConstants, target: str, only: Container[str] = SERVE_NAMES
) -> tuple[float, ...]:
    """d log(value) / d constant, by differences; 0 for those not in `only`."""
    slopes = []
    for key in SERVE_NAMES:
        if key not in only:
            slopes.append(0.0)
            continue
        value = getattr(c, key)
        up, down = (serve_value(p, replace(c, **{key: value + d}), target) for d in (STEP, -STEP))
        slope = (math.log(up) - math.log(down)) / (2 * STEP)
        slopes.append(max(-STEEPEST, min(STEEPEST, slope)))
    return tuple(slopes)


def serve_value(p: Serving, c: ServeConstants, target: str) -> float:
    """`rate`: tokens/s/chip; `tpot`: seconds per token at the point's batch; `total`: prompt and completion tokens/s/chip."""
    if target == "tpot":
        return token_s(p, c, chosen_batch(p, c))
    value = rate(p, c)
    return value * (1 + p.prompt / max(1.0, p.completion)) if target == "total" else value


@dataclass(frozen=True)
class ServeModel:
    """Constants, regression on published points, and the factor that makes its intervals hold 80 %."""

    constants: ServeConstants
    process: Process
    interval_width: float

    def predict(
        self, p: Serving, target: str = "rate", without: Container[str] = ()
    ) -> tuple[float, float, float]:
        """Value, low and high of `serve_value`, published points named `without` unlearnt. The regression learns rates; a
        latency errs the other way."""
        return self.predict_all([(p, target)], without)[0]

    def predict_all(
        self, asked: Sequence[tuple[Serving, str]], without: Container[str] = ()
    ) -> list[tuple[float, float, float]]:
        """`predict` for several points at once."""
        back = np.array(
            [getattr(ServeConstants(), n) - getattr(self.constants, n) for n in SERVE_NAMES]
        )
        points, signs = [], []
        for p, target in asked:
            sign = -1.0 if target == "tpot" else 1.0
            one = serve_point(p, self.constants, target=target)
            points.append(replace(one, gradient=tuple(sign * g for g in one.gradient)))
            signs.append(sign)
        means, spreads = self.process.predict(points, without)
        result = []
        for (p, target), one, sign, mean, sd in zip(
            asked, points, signs, means, spreads, strict=True
        ):
            shift = sign * (float(mean) + float(np.array(one.gradient) @ back))
            value = serve_value(p, self.constants, target) * math.exp(shift)
            width = math.exp(self.interval_width * float(sd))
            result.append((value, value / width, value * width))
        return result

    def basis(self, p: Serving) -> str:
        """What a forecast rests on, in words."""
        by = self.process.basis(serve_point(p, self.constants), "published points")
        return f"physics on {p.chip.figures}, corrected by {by}"

    def with_anchor(
        self, p: Serving, measured: float, *, name: str = "your service", noise: float = OWN_NOISE
    ) -> ServeModel:
        """Take one measured service of the user's own as a further point (`measured`: its rate, as `serve_value` counts it)."""
        one = replace(serve_point(p, self.constants, family=OWN, name=name), noise=noise)
        back = np.array(
            [getattr(ServeConstants(), n) - getattr(self.constants, n) for n in SERVE_NAMES]
        )
        missed = math.log(measured / serve_value(p, self.constants, "rate"))
        target = missed - float(np.array(one.gradient) @ back)
        return replace(self, process=self.process.with_point(one, target))


def serving_from(raw: Mapping[str, Any]) -> ServeModel:
    """Rebuild what fit.py wrote."""
    names = ("words", "numbers", "gradient", "family", "name", "noise")
    process = Process(
        points=tuple(Point(*[one[name] for name in names]) for one in raw["anchors"]),
        targets=np.array([one["target"] for one in raw["anchors"]]),
        terms=SERVE_TERMS,
        sizes=np.array(raw["sizes"]),
        lengths=np.array([raw["lengths"][name] for name in SERVE_NUMBERS]),
        prior_sd=np.array([getattr(SERVE_PRIOR_SD, name) for name in SERVE_NAMES]),
        noise=raw["noise"],
    )
    constants = ServeConstants(*[raw["constants"][name] for name in SERVE_NAMES])
    return ServeModel(constants, process, raw["interval_width"])


@functools.cache
def shipped_serving() -> ServeModel:
    path = resources.files("bascule.plan").joinpath("data/serving.json")
    with path.open(encoding="utf-8") as handle:
        return serving_from(json.load(handle))
