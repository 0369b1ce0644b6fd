"""A training job as a point for the regression: what may make two runs miss the physics alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Container

import numpy as np

from bascule.plan.cost import NAMES, PRIOR_SD, Constants, step_components, step_seconds
from bascule.plan.job import Job
from bascule.plan.models import model_word
from bascule.plan.regress import Point, Term

# The terms of the covariance; sizes are fitted. `stack kind` = stack and whether the model is a mixture of experts.
DRIFT_ORIGIN = 2026.25  # a stack's newest releases in the table; a job without a date counts as new

TERMS = (
    Term(()),
    Term(("vendor",)),
    Term(("chip",)),
    Term(("chip", "precision")),
    Term(("stack",)),
    Term(("stack", "kind")),
    Term(("stack", "chip", "precision", "kind")),
    Term(("precision", "kind")),
    Term((), "near"),
    Term(("stack",), "near"),
    Term(("stack", "chip", "precision"), "near"),
    Term(("stack", "model"), "near"),
    Term(("stack", "chip", "model", "precision")),
    Term(("vendor",), "constants"),
    Term(("chip",), "constants"),
    Term(("stack",), "constants"),
    Term(("stack", "chip", "precision"), "constants"),
    Term(("stack", "kind"), "drift"),
    Term(("stack", "chip", "kind"), "drift"),
)
NUMBERS = (
    "log2 hidden", "log2 layers", "log2 sequence", "log2 tp", "log2 pp", "log2 cp", "log2 ep", "log2 chips", "log2 micro tokens",
    "micro batches per stage", "attention share", "expert share", "recompute", "software year", "zero", "rows per expert", "head dim",
)  # fmt: skip


def constants_vector(c: Constants) -> np.ndarray:
    return np.array([getattr(c, name) for name in NAMES])


def gradient(
    job: Job, c: Constants, step: float = 1e-3, only: Container[str] = NAMES
) -> tuple[float, ...]:
    """d log(step time) / d constant, by central differences; constants are logarithms. 0 for those not in `only`."""
    result = []
    for name in NAMES:
        if name not in only:
            result.append(0.0)
            continue
        value = getattr(c, name)
        up = step_seconds(job, _with(c, name, value + step))
        down = step_seconds(job, _with(c, name, value - step))
        result.append((math.log(up) - math.log(down)) / (2 * step))
    return tuple(result)


def _with(c: Constants, name: str, value: float) -> Constants:
    return Constants(**{**{n: getattr(c, n) for n in NAMES}, name: value})


@functools.lru_cache(maxsize=2048)
def _slopes(job: Job, c: Constants) -> tuple[float, ...]:
    """Kept: a score asks for each of its rows several times."""
    return gradient(job, c)


def point(job: Job, c: Constants, *, family: str = "", name: str = "", noise: float = 1.0) -> Point:
    s, lay = job.shape, job.layout
    parts = step_components(job, c)
    total = sum(parts.values())
    rows = job.micro_tokens * lay.ep * s.topk / s.experts if s.moe else job.micro_tokens
    numbers = (
        math.log2(s.hidden),
        math.log2(s.layers),
        math.log2(job.sequence),
        math.log2(lay.tp),
        math.log2(lay.pp),
        math.log2(lay.cp),
        math.log2(lay.ep),
        math.log2(job.chips),
        math.log2(job.micro_tokens),
        math.log2(1 + (lay.pp - 1) / job.micro_batches),
        parts["attention"] / total,
        parts.get("experts", 0.0) / total,
        {"none": 0.0, "selective": 0.5, "full": 1.0}[lay.recompute],
        job.software_date or DRIFT_ORIGIN,
        float(lay.zero),
        math.log2(rows),
        math.log2(s.head_dim),
    )
    words = {
        "vendor": job.chip.vendor,
        "chip": job.chip.kind,
        "precision": job.precision,
        "stack": job.software,
        "kind": "moe" if s.moe else "dense",
        "model": model_word(s.name),
    }
    return Point(
        words=words,
        numbers=numbers,
        gradient=_slopes(job, c),
        family=family,
        name=name,
        noise=noise,
        year=(job.software_date or DRIFT_ORIGIN) - DRIFT_ORIGIN,
    )


def prior_vector() -> np.ndarray:
    return np.array([getattr(PRIOR_SD, name) for name in NAMES])
