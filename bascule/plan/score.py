"""How wrong the planner is: every scoreable row of a table predicted from its inputs alone, and the errors by vendor.

A row that the planner refuses counts as a miss (coverage), never as absent. Error is predicted over published throughput minus
one; the left-out score (`left_out_*`) predicts each row from the other families' rows only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bascule.errors import BasculeError, RecipeError, nearest
from bascule.plan.cost import step_seconds
from bascule.plan.fit import DATA, measured_tokens, scoreable
from bascule.plan.forecast import Model, shipped
from bascule.plan.job import Job
from bascule.plan.memory import GIB, MemoryConstants, memory_of
from bascule.plan.served import serving_of, target_of
from bascule.plan.serving import ServeModel, shipped_serving
from bascule.plan.table import Row, job_of, number, read_rows


@dataclass(frozen=True)
class Scored:
    """One row: published and predicted value, the interval's ends; `refused` says why nothing was predicted."""

    name: str
    vendor: str
    family: str
    published: float
    predicted: float | None
    low: float | None
    high: float | None
    refused: str = ""

    @property
    def error(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.published - 1


@dataclass(frozen=True)
class Summary:
    """Fractions, not percent. `coverage`: rows predicted; errors over those; `kendall_tau` over pairs within a family."""

    n: int
    coverage: float
    median_abs_error: float | None
    p90_abs_error: float | None
    bias: float | None
    within_10: float | None
    interval_coverage: float | None
    kendall_tau: float | None


def training_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if scoreable(row)]


def score_training(rows: Sequence[Row], model: Model | None = None) -> list[Scored]:
    """Predict tokens per second and chip for every scoreable row with one model."""
    used = model or shipped()
    readable: list[tuple[Row, Job]] = []
    result: dict[str, Scored] = {}
    for row in training_rows(rows):
        try:
            job = job_of(row)
            step_seconds(job, used.constants)
            readable.append((row, job))
        except BasculeError as error:
            result[row["id"]] = refused(row, measured_tokens(row) or 1.0, str(error))
    ratios, spreads = used.correction([job for _, job in readable]) if readable else ([], [])
    for (row, job), ratio, spread in zip(readable, ratios, spreads, strict=True):
        predicted = (
            job.tokens_per_step / job.chips / step_seconds(job, used.constants) / math.exp(ratio)
        )
        width = math.exp(used.interval_width * spread)
        result[row["id"]] = _scored(
            row, measured_tokens(row) or 1.0, predicted, predicted / width, predicted * width
        )
    return [result[row["id"]] for row in training_rows(rows)]


def _scored(row: Row, published: float, predicted: float, low: float, high: float) -> Scored:
    return Scored(row["id"], row["vendor"], row["family"], published, predicted, low, high)


def score_serving(rows: Sequence[Row], model: ServeModel | None = None) -> list[Scored]:
    """Predict the published rate (or latency) of every row of inference.csv that has one."""
    used = model or shipped_serving()
    return [_serving_row(row, used) for row in rows if target_of(row) is not None]


def _serving_row(row: Row, model: ServeModel) -> Scored:
    kind, published = target_of(row) or ("rate", 1.0)
    try:
        value, low, high = model.predict(serving_of(row), kind)
    except BasculeError as error:
        return refused(row, published, str(error))
    return Scored(row["id"], row["vendor"], row["family"], published, value, low, high)


def left_out_serving(
    model: ServeModel, rows: Sequence[Row], *, by: Callable[[Row], str] = lambda row: row["family"]
) -> list[Scored]:
    """Each published serving point predicted without its group; a latency errs as its rate does."""
    names = {row["id"]: row for row in rows}
    points = model.process.points
    mean, sd = model.process.left_out([by(names[p.name]) for p in points])
    result = []
    for point, target, middle, spread in zip(points, model.process.targets, mean, sd, strict=True):
        row = names[point.name]
        kind, published = target_of(row) or ("rate", 1.0)
        predicted = published * math.exp((middle - target) * (-1 if kind == "tpot" else 1))
        width = math.exp(model.interval_width * spread)
        result.append(
            Scored(
                row["id"],
                row["vendor"],
                row["family"],
                published,
                predicted,
                predicted / width,
                predicted * width,
            )
        )
    return result


def score_memory(rows: Sequence[Row], constants: MemoryConstants | None = None) -> list[Scored]:
    """Predict the published peak memory (GiB a chip) of every row that prints one."""
    result = []
    for row in rows:
        published = number(row, "mem_GiB_chip_pub")
        if published:
            found = memory_of(job_of(row), constants)
            result.append(
                Scored(
                    row["id"],
                    row["vendor"],
                    row["family"],
                    published,
                    found.total / GIB,
                    found.low / GIB,
                    found.high / GIB,
                )
            )
    return result


def false_fits(rows: Sequence[Scored], available_gib: Sequence[float]) -> int:
    """Rows that would be told to fit though their published peak does not."""
    return sum(
        row.predicted is not None and row.predicted <= room < row.published
        for row, room in zip(rows, available_gib, strict=True)
    )


def score_file(path: Path, kind: str | None = None) -> dict[str, Any]:
    """`bascule plan score FILE [--kind train|inference]`: the report of one table. The kind is told from its columns."""
    rows = read_rows(path)
    found = kind or ("inference" if rows and "phase" in rows[0] else "train")
    if found not in ("train", "inference"):
        raise RecipeError(
            f"--kind '{found}' is not known; allowed: train, inference.{nearest(found, ('train', 'inference'))}"
        )
    column = "phase" if found == "inference" else "seq_len"
    if rows and column not in rows[0]:
        raise RecipeError(
            f"The table '{path}' has no column '{column}', which every {found} table has; give the other --kind."
        )
    scored = score_serving(rows) if found == "inference" else score_training(rows)
    known = _own_rows(rows, found)
    return {"kind": found, "left_out": sum(row.name in known for row in scored)} | report(
        [known.get(row.name, row) for row in scored]
    )


def _own_rows(rows: Sequence[Row], kind: str) -> dict[str, Scored]:
    """Rows that the planner was fitted on, predicted without their family: repeating a published figure is no forecast."""
    model = shipped_serving() if kind == "inference" else shipped()
    here = {row["id"]: row for row in rows}
    data = read_rows(DATA / ("inference.csv" if kind == "inference" else "runs.csv"))
    own = left_out_serving(model, data) if isinstance(model, ServeModel) else left_out(model, data)
    return {one.name: one for one in own if one.name in here and _same_run(here[one.name], data)}


def _same_run(row: Row, data: Sequence[Row]) -> bool:
    """Not merely the same id: model, chip and count agree too."""
    return any(
        all(row.get(key) == one.get(key) for key in ("id", "model", "chip", "chips"))
        for one in data
    )


def refused(row: Row, published: float, why: str) -> Scored:
    return Scored(row["id"], row["vendor"], row["family"], published, None, None, None, why)


def left_out(
    model: Model, rows: Sequence[Row], *, by: Callable[[Row], str] = lambda row: row["family"]
) -> list[Scored]:
    """Each anchor row predicted without its group (default: its family), the physics' constants unlearnt to first order."""
    names = {row["id"]: row for row in rows}
    points = model.process.points
    groups = [by(names[p.name]) for p in points]
    mean, sd = model.process.left_out(groups)
    result = []
    for point, target, middle, spread in zip(points, model.process.targets, mean, sd, strict=True):
        row = names[point.name]
        published = measured_tokens(row) or 1.0
        predicted = published * math.exp(target - middle)
        width = math.exp(model.interval_width * spread)
        result.append(
            Scored(
                row["id"],
                row["vendor"],
                row["family"],
                published,
                predicted,
                predicted / width,
                predicted * width,
            )
        )
    return result


def summarise(rows: Sequence[Scored]) -> Summary:
    done = [row for row in rows if row.predicted is not None]
    if not done:
        return Summary(len(rows), 0.0, None, None, None, None, None, None)
    errors = np.array([row.error for row in done], dtype=float)
    inside = [
        row.low <= row.published <= row.high
        for row in done
        if row.low is not None and row.high is not None
    ]
    return Summary(
        n=len(rows),
        coverage=len(done) / len(rows),
        median_abs_error=float(np.median(np.abs(errors))),
        p90_abs_error=float(np.quantile(np.abs(errors), 0.9)),
        bias=float(np.median(errors)),
        within_10=float(np.mean(np.abs(errors) <= 0.1)),
        interval_coverage=float(np.mean(inside)) if inside else None,
        kendall_tau=kendall(done),
    )


def kendall(rows: Sequence[Scored]) -> float | None:
    """Concordant minus discordant over all pairs of one family, published values within 1 % of each other left out."""
    agree = total = 0
    families: dict[str, list[Scored]] = {}
    for row in rows:
        families.setdefault(row.family.split("|")[0], []).append(row)
    for members in families.values():
        for i, a in enumerate(members):
            for b in members[i + 1 :]:
                if (
                    a.predicted is None
                    or b.predicted is None
                    or abs(math.log(a.published / b.published)) < 0.01
                ):
                    continue
                total += 1
                agree += 1 if (a.published > b.published) == (a.predicted > b.predicted) else -1
    return agree / total if total else None


def report(rows: Sequence[Scored]) -> dict[str, Any]:
    """The `--json` form: `overall`, `by_vendor`, and the refused rows with their reasons."""
    if not rows:
        raise RecipeError(
            "The table has no scoreable row: training needs tier A or A- with a published throughput, inference a published rate or latency."
        )
    vendors = dict.fromkeys(row.vendor for row in rows)
    return {
        "overall": asdict(summarise(rows)),
        "by_vendor": {
            vendor: asdict(summarise([row for row in rows if row.vendor == vendor]))
            for vendor in vendors
        },
        "refused": {row.name: row.refused for row in rows if row.refused},
    }


def as_text(result: dict[str, Any]) -> str:
    """The same for people, one line a vendor, in percent."""
    head = f"{'':<14}{'n':>5}{'covered':>9}{'median':>9}{'p90':>8}{'bias':>8}{'in 10 %':>9}{'80 % held':>11}{'tau':>7}"
    lines = (
        [head]
        if not result.get("left_out")
        else [
            f"{result['left_out']} of the rows are the planner's own data: each of those is predicted without its family",
            head,
        ]
    )
    for name, one in [("all", result["overall"]), *result["by_vendor"].items()]:
        cells = [
            one["coverage"],
            one["median_abs_error"],
            one["p90_abs_error"],
            one["bias"],
            one["within_10"],
            one["interval_coverage"],
        ]
        widths = (9, 9, 8, 8, 9, 11)
        text = "".join(
            f"{'-' if c is None else f'{100 * c:.1f} %':>{w}}"
            for c, w in zip(cells, widths, strict=True)
        )
        tau = one["kendall_tau"]
        lines.append(f"{name:<14}{one['n']:>5}{text}{'-' if tau is None else f'{tau:.2f}':>7}")
    lines += [f"refused {name}: {why}" for name, why in result["refused"].items()]
    return "\n".join(lines)
