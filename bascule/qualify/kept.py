"""What earlier batteries in the same folder found: answers to keep when one was cut off, findings to ask again first. No torch.

Only batteries of the same question count: same accelerator, model, seed and depth. A finding that is asked again and does not show
is not forgotten: its new answer says that it did not happen again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bascule.qualify.check import Ask
from bascule.records import Evidence

SAME = ("accelerator", "model", "quick", "seed")
Answers = dict[str, list[Evidence]]


def launches(folder: Path) -> int:
    """How many children have been started here; the next one's files get the next number."""
    return max(
        (int(path.stem.rpartition("-")[2]) for path in folder.glob("request-*.json")), default=0
    )


def answers(folder: Path, request: Mapping[str, Any]) -> Answers:
    """Question -> its newest complete answer. A question that was begun and not ended (a crash, a hang) has none."""
    found: Answers = {}
    for number in range(1, launches(folder) + 1):
        if _same(folder / f"request-{number}.json", request):
            found |= _complete(folder / f"answers-{number}.jsonl")
    return found


def opened(folder: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the chip said of itself when it was last opened here; a battery with nothing left to ask does not open it again."""
    said = None
    for number in range(1, launches(folder) + 1):
        if _same(folder / f"request-{number}.json", request):
            for entry in _lines(folder / f"answers-{number}.jsonl"):
                said = entry.get("opened", said)
    return said


def findings_first(questions: Sequence[Ask], known: Answers) -> list[Ask]:
    """The order of the battery, but questions that were answered badly last time come first."""
    return sorted(questions, key=lambda ask: not _bad(known.get(ask.name, [])))


def not_again(item: Evidence, name: str, known: Answers) -> Evidence:
    """A pass after a finding keeps the finding's memory."""
    if item.outcome != "pass" or not _bad(known.get(name, [])):
        return item
    was = next(old.detail for old in known[name] if old.outcome in ("fail", "error"))
    return item.model_copy(update={"detail": f"did not happen again: {was} | now: {item.detail}"})


def _bad(evidence: Sequence[Evidence]) -> bool:
    return any(item.outcome in ("fail", "error") for item in evidence)


def _same(path: Path, request: Mapping[str, Any]) -> bool:
    if not path.exists():
        return False
    stored = json.loads(path.read_text(encoding="utf-8"))
    return all(stored.get(name) == request[name] for name in SAME)


def _complete(path: Path) -> Answers:
    done: Answers = {}
    open_now: list[Evidence] = []
    for entry in _lines(path):
        if "begin" in entry:
            open_now = []
        elif "evidence" in entry:
            open_now.append(Evidence.model_validate(entry["evidence"]))
        elif "end" in entry:
            done[entry["end"]] = open_now
    return done


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only; the last one may have been cut off by a crash."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]
