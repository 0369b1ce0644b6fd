"""`bascule report`: write report.html from the ledger, and answer with the run's summary."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from bascule.errors import UsageError
from bascule.folder import RunFolder, write_atomic
from bascule.ledger import read_ledger
from bascule.records import AnyRecord
from bascule.report import seeds
from bascule.report.page import render
from bascule.report.story import sentences, summary
from bascule.stages.answer import Answer, duration


def main(arguments: Namespace) -> Answer:
    folder = RunFolder(Path(arguments.run))
    records = _read(folder)
    others = [_read(RunFolder(Path(run))) for run in arguments.seeds]
    odd = seeds.differing([records, *others])
    if odd:
        raise UsageError(
            f"The runs are not seeds of one recipe: they differ in [{'], ['.join(odd)}]. Name runs of the same recipe with --seeds, "
            "or ask bascule compare-runs."
        )
    if twice := seeds.repeated([records, *others]):
        raise UsageError(
            f"More than one of the runs has seed {', '.join(map(str, twice))}: a range over seeds counts each once. Name runs of different seeds."
        )
    write(folder, others)
    data = summary(records)
    if others:
        data["seeds"] = seeds.summary([records, *others])
    start_s = records[0].time_s if records else 0.0
    story = [f"  {duration(one.time_s - start_s):>8}  {one.text}" for one in sentences(records)]
    ended = {phase: of for phase, of in data.get("seeds", {}).items() if phase != "evaluate"}
    for phase, of in ended.items():
        story.append(
            f"  {len(of['pass_at_1'])} seeds after {phase.upper()}: pass@1 {of['mean']:.1%} in the mean, {min(of['pass_at_1']):.1%} to {max(of['pass_at_1']):.1%}."
        )
    window = f"The longest window of steps that no certified snapshot covered: {data['longest_uncertified_steps']}."
    return Answer(
        text="\n".join([data["headline"], *story, window, f"Report: {folder.report}"]), data=data
    )


def _read(folder: RunFolder) -> list[AnyRecord]:
    if not folder.ledger.exists():
        raise UsageError(
            f"'{folder.root}' is not a run folder: it has no ledger.jsonl. Give a folder under out/, for instance out/demo."
        )
    return read_ledger(folder.ledger)


def write(folder: RunFolder, others: Sequence[Sequence[AnyRecord]] = ()) -> None:
    page = render(read_ledger(folder.ledger), others)
    write_atomic(folder.report, lambda path: _write_text(path, page))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
