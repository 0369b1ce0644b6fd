"""How wrong the planner is: every scoreable row of a table predicted from its inputs alone, and the errors by vendor.

A row that the planner refuses counts as a miss (coverage), never as absent. Error is predicted over published throughput minus
one. Repeating a published figure is no forecast: a row that the planner was fitted on (told by its inputs, whatever it is
called) is predicted from the other families' rows only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bascule.errors import BasculeError, RecipeError, nearest
from bascule.plan.catalogue import Chip
from bascule.plan.cost import step_seconds
from bascule.plan.fit import measured_tokens, scoreable
from bascule.plan.forecast import Model, shipped
from bascule.plan.job import Job
from bascule.plan.memory import GIB, MemoryConstants, memory_of
from bascule.plan.regress import Point, Process
from bascule.plan.run_features import point
from bascule.plan.runs_table import Row, has_column, job_of, number, read_rows
from bascule.plan.serving import Serving
from bascule.plan.serving_forecast import ServeModel, serve_point, shipped_serving
from bascule.plan.serving_table import serving_of, target_of


@dataclass(frozen=True)
class Scored:
    """One row: published and predicted value, the interval's ends; `refused` says why nothing was predicted, `left_out` that
    the planner knew this run and predicted it without its group."""

    name: str
    vendor: str
    family: str
    published: float
    predicted: float | None
    low: float | None
    high: float | None
    refused: str = ""
    left_out: bool = False

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


Group = Callable[[Point], str]  # which published runs are left out together


def by_family(one: Point) -> str:
    return one.family


STAND_IN_SD = (
    0.4  # of the logarithm, where a sibling answers for a chip that is not in the catalogue
)


def unknown_chip(chip: Chip) -> float:
    return STAND_IN_SD if chip.basis == "stand-in" else 0.0


SCOREABLE = (
    "training needs tier A or A- with a published throughput, inference a published rate or latency"
)


def training_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if scoreable(row)]


def relatives(process: Process, new: Point, by: Group) -> frozenset[str]:
    """Published runs that may not be asked about this one: if it is one of them itself, its whole group; else none."""
    own = process.same(new)
    if own is None:
        return frozenset()
    return frozenset(one.name for one in process.points if by(one) == by(own))


def score_training(
    rows: Sequence[Row], model: Model | None = None, *, by: Group = by_family
) -> list[Scored]:
    """Predict tokens per second and chip for every scoreable row from its inputs; a row that the model was fitted on is
    predicted without its group."""
    used = model or shipped()
    found: dict[int, Scored] = {}
    waiting: dict[frozenset[str], list[tuple[int, Row, Job]]] = {}
    for index, row in enumerate(training_rows(rows)):
        try:
            job = job_of(row)
            hidden = relatives(used.process, point(job, used.constants, name=row["id"]), by)
            waiting.setdefault(hidden, []).append((index, row, job))
        except BasculeError as error:
            found[index] = _scored(row, measured_tokens(row), None, str(error))
    for hidden, members in waiting.items():
        ratios, spreads = used.correction([job for *_, job in members], hidden)
        for (index, row, job), ratio, spread in zip(members, ratios, spreads, strict=True):
            seconds = step_seconds(job, used.constants) * math.exp(ratio)
            rate = job.tokens_per_step / job.chips / seconds
            width = math.exp(used.interval_width * math.hypot(spread, unknown_chip(job.chip)))
            answer = (rate, rate / width, rate * width)
            found[index] = _scored(row, measured_tokens(row), answer, left_out=bool(hidden))
    return [found[index] for index in sorted(found)]


def score_serving(
    rows: Sequence[Row], model: ServeModel | None = None, *, by: Group = by_family
) -> list[Scored]:
    """Predict the published rate (or latency) of every row of inference.csv that has one, likewise."""
    used = model or shipped_serving()
    found: dict[int, Scored] = {}
    waiting: dict[frozenset[str], list[tuple[int, Row, Serving, str, float]]] = {}
    for index, row in enumerate(rows):
        target = target_of(row)
        if target is None:
            continue
        try:
            asked = serving_of(row)
            one = serve_point(asked, used.constants, target=target[0], name=row["id"])
            hidden = relatives(used.process, one, by)
            waiting.setdefault(hidden, []).append((index, row, asked, *target))
        except BasculeError as error:
            found[index] = _scored(row, target[1], None, str(error))
    for hidden, members in waiting.items():
        answers = used.predict_all([(asked, kind) for _, _, asked, kind, _ in members], hidden)
        for (index, row, asked, _, published), (value, low, high) in zip(
            members, answers, strict=True
        ):
            wider = math.exp(unknown_chip(asked.chip))
            answer = (value, low / wider, high * wider)
            found[index] = _scored(row, published, answer, left_out=bool(hidden))
    return [found[index] for index in sorted(found)]


def score_memory(rows: Sequence[Row], constants: MemoryConstants | None = None) -> list[Scored]:
    """Predict the published peak memory (GiB a chip) of every row that prints one."""
    result = []
    for row in rows:
        published = number(row, "mem_GiB_chip_pub")
        if published:
            found = memory_of(job_of(row), constants)
            answer = (found.total / GIB, found.low / GIB, found.high / GIB)
            result.append(_scored(row, published, answer))
    return result


def _scored(
    row: Row, published: float | None, answer: tuple[float, float, float] | None, refused: str = "", *, left_out: bool = False
) -> Scored:  # fmt: skip
    value, low, high = answer or (None, None, None)
    vendor = row["vendor"] or "unknown"
    return Scored(
        row["id"], vendor, row["family"], published or 1.0, value, low, high, refused, left_out
    )


def score_file(path: Path, kind: str | None = None) -> dict[str, Any]:
    """`bascule plan score FILE [--kind train|inference]`: the report of one table. The kind is told from its columns."""
    rows = read_rows(path)
    serving = has_column(rows, "phase") or (
        not has_column(rows, "seq_len") and has_column(rows, "isl")
    )
    found = kind or ("inference" if serving else "train")
    if found not in ("train", "inference"):
        raise RecipeError(
            f"--kind '{found}' is not known; allowed: train, inference.{nearest(found, ('train', 'inference'))}"
        )
    scored = score_serving(rows) if found == "inference" else score_training(rows)
    kept = {row.name for row in scored}
    return {
        "kind": found,
        "left_out": sum(row.left_out for row in scored),
        "set_aside": [row["id"] for row in rows if row["id"] not in kept],
    } | report(scored)


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
        raise RecipeError(f"The table has no scoreable row: {SCOREABLE}.")
    vendors = dict.fromkeys(row.vendor for row in rows)
    return {
        "overall": asdict(summarise(rows)),
        "by_vendor": {
            vendor: asdict(summarise([row for row in rows if row.vendor == vendor]))
            for vendor in vendors
        },
        "refused": {row.name: row.refused for row in rows if row.refused},
        "rows": [asdict(row) for row in rows],
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
    if aside := result.get("set_aside"):
        lines.append(f"set aside, counted nowhere: {len(aside)} ({', '.join(aside[:4])}{', ...' if len(aside) > 4 else ''}); {SCOREABLE}")  # fmt: skip
    lines += [f"refused {name}: {why}" for name, why in result["refused"].items()]
    return "\n".join(lines)
