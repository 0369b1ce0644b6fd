"""What earlier batteries in the same folder found: answers to keep when one was cut off, findings to ask again first. No torch.

Only batteries of the same question count: same accelerator, model, type, seed and depth. A finding that is asked again and does not
show is not forgotten: the outcome is `not again`, and only what stays away the next time too is a pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bascule.qualify.check import Ask
from bascule.records import Evidence

SAME = ("accelerator", "model", "dtype", "quick", "seed")
Answers = dict[str, list[Evidence]]


def launches(folder: Path) -> int:
    """How many children have been started here; the next one's files get the next number."""
    return max(
        (int(path.stem.rpartition("-")[2]) for path in folder.glob("request-*.json")), default=0
    )


def answers(folder: Path, request: Mapping[str, Any], *, lost: bool) -> Answers:
    """Question -> its newest answer. Crashes and hangs, which the supervisor wrote down, count with `lost` only."""
    found: Answers = {}
    for number in range(1, launches(folder) + 1):
        if _same(folder / f"request-{number}.json", request):
            found |= _answered(folder / f"answers-{number}.jsonl", lost)
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
    """A pass after a finding is no pass yet."""
    if item.outcome != "pass" or not _bad(known.get(name, [])):
        return item
    was = next(old.detail for old in known[name] if old.outcome in ("fail", "error"))
    words = f"did not happen again: {was} | now: {item.detail} | a second clean battery clears it"
    return item.model_copy(update={"outcome": "not again", "detail": words})


def _bad(evidence: Sequence[Evidence]) -> bool:
    return any(item.outcome in ("fail", "error") for item in evidence)


def _same(path: Path, request: Mapping[str, Any]) -> bool:
    if not path.exists():
        return False
    stored = json.loads(path.read_text(encoding="utf-8"))
    return all(stored.get(name) == request[name] for name in SAME)


def write_lost(path: Path, name: str, item: Evidence) -> None:
    """Add to a dead child's answers that its question `name` ended it."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"lost": name, "evidence": item.model_dump(mode="json")}) + "\n")


def _answered(path: Path, lost: bool) -> Answers:
    done: Answers = {}
    open_now: list[Evidence] = []
    for entry in _lines(path):
        if "begin" in entry:
            open_now = []
        elif "lost" in entry:
            if lost:
                done[entry["lost"]] = [Evidence.model_validate(entry["evidence"])]
        elif "evidence" in entry:
            open_now.append(Evidence.model_validate(entry["evidence"]))
        elif "end" in entry:
            done[entry["end"]] = open_now
    return done


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only; the last one may have been cut off by a crash."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]
