"""The one script that sets every fitted constant of the training model, from the table of published runs.

    python -m bascule.plan.fit [--check]

Reads the rows whose throughput was published and whose source was read (rows and cells marked `recall` are left out), finds the
physics' constants (maximum a posteriori, Gauss-Newton on log time), then the sizes of the regression's terms (leave-one-family-out
predictive density), the memory and the inference model's likewise, and writes `data/constants.json` and `data/serving.json`. `--check` compares instead of writing, for CI.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bascule.plan.cost import NAMES, Constants, step_seconds
from bascule.plan.fit_serving import (
    SETTLED,
    build_serving,
    felt,
    fit_constants,
    serving_plain,
    serving_points,
    usable_serving,
)
from bascule.plan.job import Job
from bascule.plan.memory import GIB, MemoryConstants, memory_of
from bascule.plan.regress import Array, Point, Process, distrusting
from bascule.plan.run_features import (
    NUMBERS,
    TERMS,
    constants_vector,
    gradient,
    point,
    prior_vector,
)
from bascule.plan.runs_table import Row, job_of, number, read_rows
from bascule.plan.sizes import fit_sizes

# Where the ascent starts: guesses of how much runs of one vendor, chip, stack... miss alike, and over what distance.
START_SIZES = np.array(
    [
        0.05,
        0.09,
        0.04,
        0.04,
        0.09,
        0.15,
        0.04,
        0.05,
        0.08,
        0.06,
        0.05,
        0.03,
        0.02,
        0.2,
        0.2,
        0.35,
        0.4,
        0.15,
        0.08,
    ]
)
START_LENGTHS = np.array(
    [3.6, 6.0, 5.0, 6.0, 8.0, 2.0, 8.0, 12.0, 3.0, 1.4, 0.8, 1.6, 1.2, 2.0, 1.4, 8.0, 4.0]
)
START_NOISE = {"dense": 0.02, "moe": 0.08}

DATA = Path(__file__).parent / "data"
PRIOR = Constants()


def usable(row: Row) -> bool:
    """Published throughput (tier A or A-) and a source that was read, the layout included."""
    return scoreable(row) and "recall" not in row["verified"]


def scoreable(row: Row) -> bool:
    return row["tier"] in ("A", "A-") and measured_tokens(row) is not None


def measured_tokens(row: Row) -> float | None:
    """The answer of a row: tokens per second and chip. Only fitting and scoring may call this."""
    value = number(row, "tok_s_chip") or number(row, "d_tok_s_chip")
    if value is not None:
        return value if value > 0 else None
    needed = [number(row, key) for key in ("global_batch_seqs", "seq_len", "step_time_s", "chips")]
    batch, sequence, seconds, chips = needed
    known = batch and sequence and seconds and chips and min(batch, sequence, seconds, chips) > 0
    return batch * sequence / seconds / chips if known else None  # type: ignore[operator]


def fit_physics(
    jobs: Sequence[Job], log_seconds: Array, *, rounds: int = 12, noise: float = 0.25
) -> Constants:
    """Maximum a posteriori constants; errors are taken robustly (weights fall off beyond `noise`)."""
    start, sd = constants_vector(PRIOR), prior_vector()
    theta, precision = start.copy(), np.diag(1 / sd**2)
    moving: list[Container[str]] = [NAMES] * len(
        jobs
    )  # a dense job's time does not feel an expert's constant: half are spared
    for _ in range(rounds):
        c = Constants(*theta.tolist())
        missed = log_seconds - np.array([math.log(step_seconds(job, c)) for job in jobs])
        slope = np.array([gradient(job, c, only=m) for job, m in zip(jobs, moving, strict=True)])
        moving = [felt(NAMES, row) for row in slope]
        weight = 1 / (noise**2 * (1 + (missed / noise) ** 2 / 4))
        system = slope.T @ (weight[:, None] * slope) + precision
        step = np.linalg.solve(system, slope.T @ (weight * missed) - precision @ (theta - start))
        theta = theta + np.clip(step, -0.5, 0.5)
        if np.abs(step).max() < SETTLED:
            break
    return Constants(*theta.tolist())


def build(
    rows: Sequence[Row], c: Constants, sizes: Array, lengths: Array, noise: dict[str, float]
) -> Process:
    """The regression over these rows. Targets are relative to the physics at the constants' prior, linearised at `c`."""
    jobs = [job_of(row) for row in rows]
    points = tuple(
        point(
            job, c, family=row["family"], name=row["id"], noise=1.5 if row["tier"] == "A-" else 1.0
        )
        for job, row in zip(jobs, rows, strict=True)
    )
    return Process(
        points, targets(rows, jobs, points, c), TERMS, sizes, lengths, prior_vector(), noise
    )


def targets(
    rows: Sequence[Row], jobs: Sequence[Job], points: Sequence[Point], c: Constants
) -> Array:
    back = constants_vector(PRIOR) - constants_vector(c)
    result = []
    for row, job, one in zip(rows, jobs, points, strict=True):
        seconds = job.tokens_per_step / (measured_tokens(row) or 1) / job.chips
        result.append(
            math.log(seconds)
            - math.log(step_seconds(job, c))
            - float(np.array(one.gradient) @ back)
        )
    return np.array(result)


MEMORY_PRIOR = {
    "base_gib": (2.0, 0.5),
    "slack": (1.05, 0.05),
    "kept": (0.9, 0.2),
    "logits_bytes": (9.0, 0.3),
}
STACK_SLACK_SD = 0.1


def memory_rows(rows: Sequence[Row]) -> list[Row]:
    return [
        row for row in rows if number(row, "mem_GiB_chip_pub") and "recall" not in row["verified"]
    ]


def fit_memory(rows: Sequence[Row]) -> MemoryConstants:
    """Maximum a posteriori constants of the memory model; the spread is the 80 % quantile of what is still missed."""
    jobs = [job_of(row) for row in rows]
    published = np.log([(number(row, "mem_GiB_chip_pub") or 1) * GIB for row in rows])
    stacks = sorted({job.software for job in jobs})
    start = np.array(
        [*[math.log(value) for value, _ in MEMORY_PRIOR.values()], *[0.0] * len(stacks)]
    )
    sd = np.array([*[width for _, width in MEMORY_PRIOR.values()], *[STACK_SLACK_SD] * len(stacks)])

    def constants(theta: Array) -> MemoryConstants:
        named = dict(zip(MEMORY_PRIOR, np.exp(theta).tolist(), strict=False))
        return MemoryConstants(
            **named,
            slack_by_stack=dict(zip(stacks, np.exp(theta[len(named) :]).tolist(), strict=True)),
        )

    def predicted(theta: Array) -> Array:
        c = constants(theta)
        return np.log([memory_of(job, c).total for job in jobs])

    theta = start.copy()
    for _ in range(10):
        here = predicted(theta)
        slope = np.stack(
            [(predicted(theta + 1e-3 * unit) - here) / 1e-3 for unit in np.eye(len(theta))], axis=1
        )
        missed = published - here
        weight = 1 / (0.08**2 * (1 + (missed / 0.08) ** 2 / 4))
        system = slope.T @ (weight[:, None] * slope) + np.diag(1 / sd**2)
        theta = theta + np.clip(
            np.linalg.solve(system, slope.T @ (weight * missed) - (theta - start) / sd**2),
            -0.3,
            0.3,
        )
    left = np.abs(published - predicted(theta))
    return replace(constants(theta), spread=float(np.exp(max(0.08, np.quantile(left, 0.8) * 1.3))))


def interval_width(process: Process) -> float:
    """The factor on the standard deviation at which left-out intervals held 80 % of the rows: families and single rows pooled."""
    pooled = []
    for groups in (None, [p.name for p in process.points]):
        mean, sd = process.left_out(groups)
        fresh = [replace(one, noise=1.0) for one in process.points]
        own = process.noise_variance(fresh) - process.noise_variance(process.points)
        told = np.sqrt(np.maximum(sd**2 + own, 1e-8))  # a new run is not known to be odd
        pooled.append(np.abs(process.targets - mean) / told)
    return float(np.quantile(np.concatenate(pooled), 0.80))


def fit(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything the planner loads, as plain values."""
    jobs = [job_of(row) for row in rows]
    seconds = np.array(
        [
            math.log(j.tokens_per_step / (measured_tokens(r) or 1) / j.chips)
            for j, r in zip(jobs, rows, strict=True)
        ]
    )
    c = fit_physics(jobs, seconds)
    process = distrusting(fit_sizes(build(rows, c, START_SIZES, START_LENGTHS, START_NOISE)))
    memory = fit_memory(memory_rows(rows))
    return to_plain(c, process) | {
        "memory": {key: _rounded(value) for key, value in asdict(memory).items()}
    }


def _rounded(value: Any) -> Any:
    return (
        {key: round(part, 4) for key, part in value.items()}
        if isinstance(value, dict)
        else round(value, 4)
    )


def fit_serving(rows: Sequence[Row]) -> dict[str, Any]:
    """The inference model's constants and regression, as plain values."""
    used = [row for row in rows if usable_serving(row)]
    c = fit_constants(serving_points(used))
    process = distrusting(fit_sizes(build_serving(used, c), rounds=40, pull=0.01))
    return serving_plain(c, process, interval_width(process))


def to_plain(c: Constants, process: Process) -> dict[str, Any]:
    return {
        "constants": {name: round(getattr(c, name), 5) for name in NAMES},
        "sizes": [round(float(x), 5) for x in process.sizes],
        "lengths": dict(zip(NUMBERS, [round(float(x), 4) for x in process.lengths], strict=True)),
        "noise": {kind: round(value, 5) for kind, value in process.noise.items()},
        "interval_width": round(interval_width(process), 4),
        "anchors": [
            {
                "name": p.name,
                "family": p.family,
                "words": dict(p.words),
                "numbers": [round(x, 4) for x in p.numbers],
                "gradient": [round(x, 5) for x in p.gradient],
                "noise": p.noise,
                "year": round(p.year, 4),
                "target": round(float(t), 5),
            }
            for p, t in zip(process.points, process.targets, strict=True)
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=DATA / "runs.csv")
    parser.add_argument("--inference", type=Path, default=DATA / "inference.csv")
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail when the shipped constants differ from a fresh fit",
    )
    options = parser.parse_args(arguments)
    fresh = {
        "constants.json": fit([row for row in read_rows(options.runs) if usable(row)]),
        "serving.json": fit_serving(read_rows(options.inference)),
    }
    if options.check:
        return max(_compare(name, result) for name, result in fresh.items())
    for name, result in fresh.items():
        (DATA / name).write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"wrote {DATA / name} from {len(result['anchors'])} published rows")
    return 0


def _compare(name: str, result: dict[str, Any]) -> int:
    """0 where a fresh fit gives what is shipped, the published rows' own figures included; prints the first difference."""
    shipped = json.loads((DATA / name).read_text(encoding="utf-8"))
    found = next(_differences(shipped, json.loads(json.dumps(result)), ""), None)
    print(f"{name}: {f'differs in {found}' if found else 'the same'}")
    return 3 if found else 0


AGREES = 0.02  # absolute below 1, else relative: rounding of a library may move a fit by less


def _differences(a: Any, b: Any, at: str) -> Iterator[str]:
    """Places where two plain values differ by more than rounding."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _differences(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from _differences(*pair, f"{at}[{index}]")
    elif isinstance(a, (int, float)) and isinstance(b, (int, float)):
        if abs(a - b) > AGREES * max(1.0, abs(a)):
            yield f"{at}: {a} shipped, {b} found"
    elif a != b:
        yield f"{at}: {str(a)[:80]} shipped, {str(b)[:80]} found"


if __name__ == "__main__":
    sys.exit(main())
