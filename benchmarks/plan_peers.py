"""What the comparisons with other planners share: their options, the rows a peer can express, and its answers as scored rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bascule.plan.fit import DATA, measured_tokens
from bascule.plan.runs_table import Row, read_rows
from bascule.plan.score import Scored, as_text, report, training_rows

Said = tuple[float | None, str]  # tokens a second and chip, or None and why a peer refuses


def asked(
    description: str | None, expressible: Callable[[Row], bool]
) -> tuple[Path, str, list[Row]]:
    """The peer's folder, its own Python, and the published runs that it can express."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the peer's repository")
    parser.add_argument("--python", default="python3", help="the Python it is installed in")
    parser.add_argument("--runs", type=Path, default=DATA / "runs.csv")
    options = parser.parse_args()
    rows = [row for row in training_rows(read_rows(options.runs)) if expressible(row)]
    return options.folder.resolve(), options.python, rows


def peer_scored(rows: Sequence[Row], ask: Callable[[Row], Said]) -> list[Scored]:
    """The peer's answer to every row; one that it refuses counts as a miss."""
    found = []
    for row in rows:
        value, why = ask(row)
        published = measured_tokens(row) or 1.0
        found.append(
            Scored(row["id"], row["vendor"], row["family"], published, value, None, None, why)
        )
    return found


def by_source(rows: Sequence[Scored]) -> list[Scored]:
    """The same rows grouped by their paper or table instead of by vendor."""
    return [replace(one, vendor=one.family.split("|")[0]) for one in rows]


def show(title: str, rows: Sequence[Scored]) -> None:
    print(f"{title}\n{as_text(report(rows))}\n")
