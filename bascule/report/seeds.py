"""Several seeds of one recipe in one chart: the mean of their rewards with the range around it, and where each one ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bascule.ledger import last, of_kind
from bascule.records import AnyRecord, Evaluation, RecipeResolved, StepStats
from bascule.report.charts import Band, Series, line_chart

SMOOTHED = 5
"""Rollouts that a point of the curve averages, itself the last: one rollout's reward jumps by its own sampling error."""

MAY_DIFFER = ("name", "seed", "pools", "prefer", "place", "qualify", "guard")
"""Sections that choose a draw or a chip; what a model learns is decided by the others."""


def differing(runs: Sequence[Sequence[AnyRecord]]) -> list[str]:
    """Sections of the recipe in which the runs differ beside those that may."""
    recipes = [found.recipe for run in runs if (found := last(run, RecipeResolved))]
    names = sorted({name for recipe in recipes for name in recipe} - set(MAY_DIFFER))
    return [name for name in names if any(one.get(name) != recipes[0].get(name) for one in recipes)]


def repeated(runs: Sequence[Sequence[AnyRecord]]) -> list[int]:
    """Seeds that more than one of the runs has: one draw counted twice makes the range look narrower than it is."""
    found = [int(one.recipe.get("seed", 0)) for run in runs if (one := last(run, RecipeResolved))]
    return sorted({seed for seed in found if found.count(seed) > 1})


def chart(runs: Sequence[Sequence[AnyRecord]]) -> str:
    """Empty when no run was rewarded."""
    curves = [_rewards(run) for run in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    at = {step: [curve[step] for curve in curves] for step in shared}
    passes = [
        (float(one.step), one.pass_at_1)
        for run in runs
        for one in of_kind(run, Evaluation)
        if one.after != "evaluate"  # asked for later, perhaps of other problems
    ]
    lowest = min([low for of in at.values() for low in of] + [share for _, share in passes], default=0.0)  # fmt: skip
    return line_chart(
        f"{len(runs)} seeds: mean, and range from lowest to highest",
        "step",
        [
            Series(f"reward (mean of the last {SMOOTHED} rollouts)", "a", [(step, sum(of) / len(of)) for step, of in at.items()]),
            Series("pass@1 held out, each seed", "b", passes, markers=True),
        ],
        band=Band("a", [(step, min(of), max(of)) for step, of in at.items()]),
        y_min=math.floor(10 * lowest) / 10,  # a band of a few points is a hairline on an axis from 0
        y_max=1.0,
    )  # fmt: skip


def _rewards(run: Sequence[AnyRecord]) -> dict[float, float]:
    """Smoothed reward by step; of a step that was taken twice the last record counts."""
    raw = {float(one.step): one.reward for one in of_kind(run, StepStats) if one.reward is not None}
    steps = sorted(raw)
    found: dict[float, float] = {}
    for index, step in enumerate(steps):
        window = [raw[one] for one in steps[max(0, index + 1 - SMOOTHED) : index + 1]]
        found[step] = sum(window) / len(window)
    return found


def summary(runs: Sequence[Sequence[AnyRecord]]) -> dict[str, Any]:
    """By phase: pass@1 of every seed, in the order the runs were named."""
    found: dict[str, list[float]] = {}
    for run in runs:
        newest = {one.after: one.pass_at_1 for one in of_kind(run, Evaluation)}
        for phase, share in newest.items():
            found.setdefault(phase, []).append(share)
    return {
        phase: {"pass_at_1": of, "mean": sum(of) / len(of), "lowest": min(of)}
        for phase, of in found.items()
    }
