"""`bascule report`: write report.html from the ledger, and answer with the run's summary."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bascule.errors import UsageError
from bascule.folder import RunFolder, write_atomic
from bascule.ledger import read_ledger
from bascule.report.page import render
from bascule.report.story import sentences, summary
from bascule.stages.answer import Answer, duration


def main(arguments: Namespace) -> Answer:
    folder = RunFolder(Path(arguments.run))
    if not folder.ledger.exists():
        raise UsageError(
            f"'{folder.root}' is not a run folder: it has no ledger.jsonl. Give a folder under out/, for instance out/demo."
        )
    write(folder)
    records = read_ledger(folder.ledger)
    data = summary(records)
    start_s = records[0].time_s if records else 0.0
    story = [f"  {duration(one.time_s - start_s):>8}  {one.text}" for one in sentences(records)]
    return Answer(text="\n".join([data["headline"], *story, f"Report: {folder.report}"]), data=data)


def write(folder: RunFolder) -> None:
    page = render(read_ledger(folder.ledger))
    write_atomic(folder.report, lambda path: _write_text(path, page))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
