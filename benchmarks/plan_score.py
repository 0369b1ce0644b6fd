"""How wrong the planner is, beside what anyone could do without one. Prints the tables of docs/plan.md.

    python benchmarks/plan_score.py [--runs FILE.csv] [--inference FILE.csv] [--refit]

Each row is predicted with its family, its paper or table, its chip, its model, its vendor, or only itself left out, and each
training row with its family, its chip and stack, or its chip left out but for one anchor run. Baselines see the same rows under the same rule:
fixed 40 % of the bf16 peak, and the median share of peak by (chip, precision, dense or sparse) of the other families. The
peers' own figures come from their papers or from running them (docs/plan.md says which).
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bascule.plan.fit import (
    DATA,
    fit_memory,
    fit_serving,
    measured_tokens,
    memory_rows,
    usable,
)
from bascule.plan.fit import fit as fit_training
from bascule.plan.forecast import model_from, shipped
from bascule.plan.memory import GIB
from bascule.plan.runs_table import Row, job_of, read_rows
from bascule.plan.score import (
    Group,
    Scored,
    as_text,
    by_family,
    report,
    score_memory,
    score_serving,
    score_training,
    training_rows,
)
from bascule.plan.serving_forecast import serving_from


def share_of_peak(row: Row, published: float) -> float:
    job = job_of(row)
    return published * job.shape.train_flops(job.sequence) / ((job.chip.bf16_tflops or 1) * 1e12)


def baseline(
    rows: Sequence[Row],
    scored: Sequence[Scored],
    guess: Callable[[Row, Sequence[Row]], float | None],
) -> list[Scored]:
    """Predictions of a rule that turns a row and the other families' rows into a share of the bf16 peak."""
    names = {one.name: one for one in scored}
    result = []
    for row in (row for row in rows if row["id"] in names):
        others = [
            other for other in rows if other["family"] != row["family"] and other["id"] in names
        ]
        share = guess(row, others)
        job = job_of(row)
        predicted = (
            None
            if share is None
            else share * (job.chip.bf16_tflops or 1) * 1e12 / job.shape.train_flops(job.sequence)
        )
        result.append(
            Scored(
                row["id"],
                row["vendor"],
                row["family"],
                names[row["id"]].published,
                predicted,
                None,
                None,
            )
        )
    return result


def fixed(_row: Row, _others: Sequence[Row]) -> float:
    return 0.4


def lookup(row: Row, others: Sequence[Row]) -> float | None:
    """Median share of peak of the rows that agree in chip, precision and kind; fewer agreements when there are none."""
    job = job_of(row)
    keys = [("chip", "precision", "moe"), ("chip", "moe"), ("chip",), ()]
    facts = [(other, job_of(other)) for other in others]
    for key in keys:
        found = [
            share_of_peak(other, published(other))
            for other, one in facts
            if all(_fact(one, k) == _fact(job, k) for k in key)
        ]
        if found:
            return statistics.median(found)
    return None


def _fact(job: object, key: str) -> object:
    chip, precision, shape = job.chip.name, job.precision, job.shape.moe  # type: ignore[attr-defined]
    return {"chip": chip, "precision": precision, "moe": shape}[key]


def published(row: Row) -> float:
    return measured_tokens(row) or 1.0


def one_anchor(rows: Sequence[Row], turn: int = 0, *, of: Group = by_family) -> list[Scored]:
    """Every group (`of`) of two or more rows is forgotten but for one row, its anchor (one measured run, trusted as its owner's;
    published runs of other groups are trusted as ever); the others are scored."""
    group = {point.name: of(point) for point in shipped().process.points}
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(group[row["id"]], []).append(row)
    return [
        one
        for sisters in members.values()
        if len(sisters) > max(1, turn)
        for one in beside(sisters[turn], sisters, of)
    ]


def beside(anchor: Row, sisters: Sequence[Row], of: Group) -> list[Scored]:
    """The other rows of a group as forecast where only its anchor is known."""
    name = anchor["id"]
    others = [row for row in sisters if row["id"] != name]
    model = shipped().trusting({name})
    return score_training(others, model, by=lambda p: p.name if p.name == name else of(p))


def each_anchor(rows: Sequence[Row], *, of: Group = by_family) -> list[Scored]:
    """The same with every row in its turn the anchor of its group, all pooled."""
    found: list[Scored] = []
    turn = 0
    while more := one_anchor(rows, turn, of=of):
        found, turn = found + more, turn + 1
    return found


ANCHORED: dict[str, Group] = {
    "family": by_family,
    "chip and its stack": lambda p: f"{p.words['chip']}, {p.words['stack']}",
    "chip": lambda p: p.words["chip"],
}
LEFT_OUT = {
    "family": by_family,
    "only the row": lambda p: p.name,
    "whole paper or table": lambda p: p.family.split("|")[0],
    "chip": lambda p: p.words["chip"],
    "model": lambda p: p.words["model"],
    "vendor": lambda p: p.words["vendor"],
}


def refitted(rows: Sequence[Row], folds: int = 8, *, by: str = "family") -> list[Scored]:
    """The honest check of (a): everything, sizes included, fitted again without each fold of families, or of single rows (`by`
    their `id`, shuffled by one seed)."""
    names = sorted({row[by] for row in rows})
    if by == "id":
        random.Random(0).shuffle(names)
    result: list[Scored] = []
    for fold in range(folds):
        held = set(names[fold::folds])
        model = model_from(fit_training([row for row in rows if row[by] not in held]))
        result += score_training([row for row in rows if row[by] in held], model)
    return result


def refitted_serving(rows: Sequence[Row], folds: int = 8) -> list[Scored]:
    families = sorted({row["family"] for row in rows})
    result: list[Scored] = []
    for fold in range(folds):
        held = set(families[fold::folds])
        model = serving_from(fit_serving([row for row in rows if row["family"] not in held]))
        result += score_serving([row for row in rows if row["family"] in held], model)
    return result


def memory_left_out(rows: Sequence[Row]) -> list[Scored]:
    found: list[Scored] = []
    for family in sorted({row["family"] for row in rows}):
        constants = fit_memory([row for row in rows if row["family"] != family])
        found += score_memory([row for row in rows if row["family"] == family], constants)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=DATA / "runs.csv")
    parser.add_argument("--inference", type=Path, default=DATA / "inference.csv")
    parser.add_argument(
        "--refit", action="store_true", help="also refit everything in eight folds (minutes)"
    )
    options = parser.parse_args()
    rows = read_rows(options.runs)
    anchors = [row for row in rows if usable(row)]
    scored = score_training(anchors)
    for name, by in LEFT_OUT.items():
        show(f"training, {name} left out", score_training(anchors, by=by))
    for kind, moe in (("dense", False), ("sparse", True)):
        names = {row["id"] for row in anchors if job_of(row).shape.moe == moe}
        show(f"training, family left out, {kind}", [one for one in scored if one.name in names])
    for name in ("family", "whole paper or table"):
        cases = [row for row in anchors if row["family"].startswith("simumax")]
        show(f"training, SimuMax's B200 cases, {name} left out", score_training(cases, by=LEFT_OUT[name]))  # fmt: skip
    for name, of in ANCHORED.items():
        show(f"training, {name} left out but for one anchor run", one_anchor(anchors, of=of))
        show("training, the same, every row in turn the anchor", each_anchor(anchors, of=of))
    show("  baseline: 40 % of the bf16 peak", baseline(rows, scored, fixed))
    show(
        "  baseline: median share of peak by chip, precision, dense or sparse",
        baseline(rows, scored, lookup),
    )
    recalled = [row for row in training_rows(rows) if not usable(row)]
    if recalled:
        show("training, rows marked recall (never used)", score_training(recalled))
    if options.refit:
        show("training, refitted in eight folds", refitted(anchors))
        show("training, refitted without each random fifth", refitted(anchors, 5, by="id"))
    printed = memory_rows(rows)
    show("memory, as shipped", score_memory(printed))
    held = memory_left_out(printed)
    show("memory, family left out", held)
    room = {row["id"]: (job_of(row).chip.memory_gb or np.inf) * 1e9 / GIB for row in printed}
    wrong = [
        one.name
        for one in held
        if one.predicted is not None and one.predicted <= room[one.name] < one.published
    ]
    print(f"false 'fits': {len(wrong)} {wrong}\n")
    serving = read_rows(options.inference)
    for name, by in LEFT_OUT.items():
        show(f"inference, {name} left out", score_serving(serving, by=by))
    if options.refit:
        show("inference, refitted in eight folds", refitted_serving(serving))


def show(title: str, scored: Sequence[Scored]) -> None:
    print(f"{title}\n{as_text(report(scored))}\n")


if __name__ == "__main__":
    main()
