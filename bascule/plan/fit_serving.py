"""Fitting the inference model to inference.csv: the same two steps as fit.py, on published serving points.

Answers are tokens a second and chip, or a latency; inputs never include them (serving_table.py).
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from bascule.plan.regress import Array, Point, Process
from bascule.plan.runs_table import Row
from bascule.plan.serving import SERVE_NAMES, SERVE_PRIOR_SD, ServeConstants, Serving
from bascule.plan.serving_forecast import (
    SERVE_NUMBERS,
    SERVE_TERMS,
    serve_point,
    serve_slopes,
    serve_value,
)
from bascule.plan.serving_table import serving_of, target_of

START_SIZES = np.array([0.1, 0.1, 0.08, 0.3, 0.12, 0.1])
START_LENGTHS = np.array([5.0, 12.0, 2.0, 10.0, 4.0, 6.0, 1.0, 2.5])
SETTLED = 1e-4  # a step in every constant's logarithm that changes no figure
START_NOISE = {"prefill": 0.1, "decode": 0.2, "both": 0.1}


def fit_constants(
    points: Sequence[tuple[Serving, str, float]], *, rounds: int = 15, noise: float = 0.35
) -> ServeConstants:
    """Maximum a posteriori constants, robust Gauss-Newton on the logarithm of the answers."""
    start = np.array([getattr(ServeConstants(), n) for n in SERVE_NAMES])
    sd = np.array([getattr(SERVE_PRIOR_SD, n) for n in SERVE_NAMES])
    theta = start.copy()
    moving: list[Container[str]] = [SERVE_NAMES] * len(points)
    for _ in range(rounds):
        c = ServeConstants(*theta.tolist())
        here = np.array([math.log(serve_value(p, c, t)) for p, t, _ in points])
        slope = np.array(
            [serve_slopes(p, c, t, m) for (p, t, _), m in zip(points, moving, strict=True)]
        )
        moving = [felt(SERVE_NAMES, row) for row in slope]
        missed = np.log([value for *_, value in points]) - here
        weight = 1 / (noise**2 * (1 + (missed / noise) ** 2 / 4))
        system = slope.T @ (weight[:, None] * slope) + np.diag(1 / sd**2)
        step = np.linalg.solve(system, slope.T @ (weight * missed) - (theta - start) / sd**2)
        theta = theta + np.clip(step, -0.4, 0.4)
        if np.abs(step).max() < SETTLED:
            break
    return ServeConstants(*theta.tolist())


def felt(names: Sequence[str], slopes: Array) -> frozenset[str]:
    """Constants that a point feels at all: what is exactly 0 is so by its kind, and need not be asked again."""
    return frozenset(name for name, slope in zip(names, slopes, strict=True) if slope)


def build_serving(rows: Sequence[Row], c: ServeConstants) -> Process:
    """The regression over these rows: log(published / physics), latencies turned into rates."""
    points, targets = [], []
    back = np.array([getattr(ServeConstants(), n) - getattr(c, n) for n in SERVE_NAMES])
    for row in rows:
        kind, value = target_of(row) or ("rate", 1.0)
        p = serving_of(row)
        sign = -1.0 if kind == "tpot" else 1.0
        one = serve_point(p, c, target=kind, family=row["family"], name=row["id"])
        one = Point(
            one.words,
            one.numbers,
            tuple(sign * g for g in one.gradient),
            one.family,
            one.name,
            one.noise,
            one.year,
        )
        points.append(one)
        targets.append(
            sign * math.log(value / serve_value(p, c, kind)) - float(np.array(one.gradient) @ back)
        )
    prior = np.array([getattr(SERVE_PRIOR_SD, n) for n in SERVE_NAMES])
    return Process(
        tuple(points),
        np.array(targets),
        SERVE_TERMS,
        START_SIZES,
        START_LENGTHS,
        prior,
        START_NOISE,
    )


def usable_serving(row: Row) -> bool:
    return target_of(row) is not None and not row["verified"].startswith("recall")


def serving_points(rows: Sequence[Row]) -> list[tuple[Serving, str, float]]:
    found = []
    for row in rows:
        target = target_of(row)
        if target is not None:
            found.append((serving_of(row), *target))
    return found


def serving_plain(c: ServeConstants, process: Process, width: float) -> dict[str, Any]:
    """What `data/serving.json` holds."""
    anchors = [
        {"name": p.name, "family": p.family, "words": dict(p.words), "numbers": [round(x, 4) for x in p.numbers], "gradient": [round(x, 5) for x in p.gradient], "noise": p.noise, "target": round(float(t), 5)}
        for p, t in zip(process.points, process.targets, strict=True)
    ]  # fmt: skip
    return {
        "constants": {n: round(getattr(c, n), 5) for n in SERVE_NAMES},
        "sizes": [round(float(x), 5) for x in process.sizes],
        "lengths": dict(
            zip(SERVE_NUMBERS, [round(float(x), 4) for x in process.lengths], strict=True)
        ),
        "noise": {k: round(v, 5) for k, v in process.noise.items()},
        "interval_width": round(width, 4),
        "anchors": anchors,
    }
