"""What one run of a user's own does for the forecasts of its sister runs. Prints the figures of docs/plan.md, "Runs of your own".

    python benchmarks/plan_anchor.py [--runs FILE.csv]

A group of published runs is forgotten whole; then its first row is given back as its owner would type it after `--anchor`, and the
other rows are forecast without it and with it. Groups are whole papers or vendor tables of five rows and more, and families (chip,
model and stack as one) of two and more. Words leave out what a table knows beside (dates, overlap): `plan_score.py`'s one-anchor
rows count those too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bascule.plan import anchor
from bascule.plan.fit import DATA, measured_tokens, usable
from bascule.plan.forecast import Model, shipped
from bascule.plan.runs_table import Row, job_of, read_rows
from bascule.plan.score import Scored, score_training


@dataclass(frozen=True)
class Compared:
    """The same rows forecast without and with one run of their group."""

    before: list[Scored]
    after: list[Scored]

    def line(self, title: str) -> str:
        (missed, width), (now, narrower) = ((median_error(side), interval(side)) for side in (self.before, self.after))  # fmt: skip
        return f"{title}: {len(self.after)} rows, median {missed:.1%} without and {now:.1%} with one anchor, 80 % intervals {width:.2f} and {narrower:.2f} wide (high over low)"


def median_error(rows: Sequence[Scored]) -> float:
    return float(np.median([abs(one.error or 0.0) for one in rows]))


def interval(rows: Sequence[Scored]) -> float:
    return float(np.median([one.high / one.low for one in rows if one.high and one.low]))


def table_of(family: str) -> str:
    return family.split("|")[0]


def forgetting(model: Model, group: str, by: Callable[[str], str]) -> Model:
    """The model as if no run of this group had ever been published."""
    keep = [i for i, one in enumerate(model.process.points) if by(one.family) != group]
    points = tuple(model.process.points[i] for i in keep)
    targets = model.process.targets[keep]
    return replace(model, process=replace(model.process, points=points, targets=targets))


def words_of(row: Row) -> str:
    """A published row as its owner would have typed it."""
    job = job_of(row)
    lay = job.layout
    return (
        f"{job.chips} x {job.chip.name}, seq {job.sequence}, batch {job.global_batch}, {job.precision}, software {job.software.replace(',', '')}, recompute {lay.recompute}, "
        f"TP{lay.tp} PP{lay.pp} VPP{lay.vpp} CP{lay.cp} EP{lay.ep} DP{lay.dp} MB{lay.micro_batch} ZERO{lay.zero}, {measured_tokens(row)} tokens/s/chip"
    )


def compare(rows: Sequence[Row], *, tables: bool, least: int) -> Compared:
    """Every group of `least` rows or more: whole tables, else families."""
    groups: dict[str, list[Row]] = {}
    by = table_of if tables else str
    for row in rows:
        groups.setdefault(by(row["family"]), []).append(row)
    found = Compared([], [])
    for group, members in groups.items():
        if len(members) < least:
            continue
        first, *sisters = members
        blank = forgetting(shipped(), group, by)
        (run,) = anchor.read_anchor(words_of(first), job_of(first).shape)
        assert run.job is not None, f"{words_of(first)} is read as a service"
        model = blank.with_anchor(run.job, run.job.tokens_per_step / run.value / run.job.chips)
        found.before.extend(score_training(sisters, blank))
        found.after.extend(score_training(sisters, model))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=DATA / "runs.csv")
    options = parser.parse_args()
    rows = [row for row in read_rows(options.runs) if usable(row)]
    print(compare(rows, tables=True, least=5).line("tables of five rows and more forgotten whole"))
    print(compare(rows, tables=False, least=2).line("families forgotten"))


if __name__ == "__main__":
    main()
