"""What a drill has shown: the ledger held against the ground truth. Of all verbs only a drill reads what a simulated chip really did. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bascule.faults.catalogue import Profile
from bascule.folder import RunFolder
from bascule.ledger import last, of_kind, read_ledger
from bascule.records import (
    Alarm,
    AnyRecord,
    Continuation,
    Incident,
    Migration,
    PoolCondemned,
    RunFinished,
    RunStarted,
    StepStats,
    Verdict,
    Warned,
)
from bascule.stages.answer import duration
from bascule.stages.faults import families

TELLING = ("snapshot passed over", "rollout engine restarted")
"""Warnings by which a fault is seen that no incident tells of."""
ENOUGH_TO_WARN = {"timing", "storage"}
"""Families whose results are right: an alarm or a warning is all that they may cause."""
RIGHT_WORDS = {
    "arithmetic": {"persistent chip fault", "transient chip fault", "software"},
    "memory": {"persistent chip fault", "transient chip fault", "capacity"},
    "runtime": {"software", "unknown", "persistent chip fault"},
    "timing": {"unknown", "persistent chip fault"},
}
"""Family to the last word that is right; `unknown` before it is a doubt that was cleared up. A death or a hang says who, not why: `unknown` is the honest word."""

WRONG_WORDS = {"data", "optimisation"}
"""Blaming the owner's data or settings for a chip's fault is wrong at any point of the story."""


@dataclass(frozen=True)
class Sighting:
    """Something recorded about the planted pool: at which step, by whom, how long after the run began."""

    step: int | None
    by: str
    what: str
    after_s: float


@dataclass
class Drilled:
    """One drill. `fired` counts entries of the ground truth in training and rollouts; `recovery_s` is the longest time from an
    incident to the next committed step. `weights_equal` is None where no undisturbed run is at hand."""

    fault: str
    planted: str
    pool: str
    ended: str
    exit_code: int
    fired: int = 0
    first_fired_step: int | None = None
    seen: list[Sighting] = field(default_factory=list)
    attributions: list[str] = field(default_factory=list)
    condemned: list[str] = field(default_factory=list)
    innocent_condemned: list[str] = field(default_factory=list)
    unfit_for: list[str] = field(default_factory=list)
    moved_to: str | None = None
    rungs: list[str] = field(default_factory=list)
    continuation_verified: bool | None = None
    steps_recomputed: int = 0
    seconds_lost: float = 0.0
    recovery_s: float | None = None
    finished: bool = False
    final_weights_sha256: str | None = None
    weights_equal: bool | None = None
    verdict: str = ""
    good: bool = False

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


def look(drilled: Drilled, folder: RunFolder, *, from_attempt: int = 1) -> None:
    """Fill in what the folder tells; records of attempts before `from_attempt` are the owner's own history."""
    everything = read_ledger(folder.ledger)
    records = [one for one in everything if one.attempt >= from_attempt]
    began = of_kind(everything, RunStarted)
    fired = _ground_truth(folder, drilled.pool)
    drilled.fired = len(fired)
    training = [one["step"] for one in fired if one.get("role", "train") == "train"]
    drilled.first_fired_step = min(training, default=None)
    mine = [one for one in records if one.pool == drilled.pool or isinstance(one, Warned)]
    drilled.seen = _sightings(mine, records[0].time_s if records else began[0].time_s)
    drilled.attributions = [one.attribution for one in of_kind(mine, Incident)]
    blamed = of_kind(records, PoolCondemned)
    drilled.condemned = [one.role for one in blamed if one.pool == drilled.pool]
    drilled.innocent_condemned = [str(one.pool) for one in blamed if one.pool != drilled.pool]
    verdicts = {one.role: one for one in of_kind(everything, Verdict) if one.pool == drilled.pool}
    drilled.unfit_for = sorted(role for role, one in verdicts.items() if one.verdict == "unfit")
    moves = of_kind(records, Migration)
    drilled.moved_to = moves[-1].to_pool if moves else None
    drilled.rungs = [one.rung for one in moves if one.rung]
    drilled.steps_recomputed = sum(one.steps_recomputed for one in moves)
    drilled.seconds_lost = sum(one.seconds_lost for one in moves)
    drilled.recovery_s = _recovery_s(records)
    proven = last(records, Continuation)
    drilled.continuation_verified = proven.verified if proven else None
    ended = last(records, RunFinished)
    drilled.finished = ended is not None
    drilled.final_weights_sha256 = ended.final_weights_sha256 if ended else None


def judge(drilled: Drilled, profile: Profile, undisturbed: str | None = None) -> None:
    """Whether that is good. `undisturbed`: the final weights of the run without the fault, to hold these against."""
    if undisturbed and drilled.final_weights_sha256:
        drilled.weights_equal = undisturbed == drilled.final_weights_sha256
    drilled.verdict, drilled.good = _verdict(drilled, profile)


def _verdict(drilled: Drilled, profile: Profile) -> tuple[str, bool]:
    if drilled.innocent_condemned:
        return f"FALSE ALARM: {', '.join(drilled.innocent_condemned)} condemned", False
    if not drilled.fired:
        return _nothing_fired(drilled, profile)
    kinds_of = families(profile)
    blamed = bool(drilled.attributions or drilled.condemned)
    if not blamed and not (drilled.seen and kinds_of <= ENOUGH_TO_WARN):
        if drilled.weights_equal:
            return "harmless: not seen, and no bit of the result differs", True
        return "MISSED", False
    if drilled.weights_equal is False:
        return "caught, but the final weights differ from the undisturbed run's", False
    right = set().union(*(RIGHT_WORDS.get(family, set()) for family in kinds_of))
    last = drilled.attributions[-1:]
    odd = WRONG_WORDS & set(drilled.attributions) or set(last) - right
    if odd:
        return f"caught, but called {', '.join(sorted(odd))}", False
    return "caught", True


def _nothing_fired(drilled: Drilled, profile: Profile) -> tuple[str, bool]:
    if drilled.attributions:
        return f"FALSE ALARMS: {len(drilled.attributions)}", False
    if not profile.faults:
        return "nothing fired, nothing cried: clean", True
    if drilled.unfit_for:
        what = ", ".join(drilled.unfit_for)
        return f"caught before the run: qualification found the chip unfit for {what}", True
    return (
        "NOTHING FIRED: the run was too short, or the fault touches nothing that it does; plant it earlier (--at-step N)",
        False,
    )


def story(drilled: Drilled) -> list[str]:
    """What was seen, when, by whom, what it cost: for people."""
    lines = [f"planted {drilled.planted} on {drilled.pool} (simulated); the run {drilled.ended}"]
    first = f", first at training step {drilled.first_fired_step}" if drilled.first_fired_step else ""  # fmt: skip
    lines.append(f"fired    {drilled.fired} times{first}")
    for one in drilled.seen[:4]:
        at = f"at step {one.step}" if one.step is not None else "outside a step"
        lines.append(
            f"seen     {at}, {duration(one.after_s)} into the run, by {one.by}: {one.what}"
        )
    if len(drilled.seen) > 4:
        lines.append(f"         and {len(drilled.seen) - 4} more")
    if drilled.condemned:
        lines.append(f"called   {', '.join(dict.fromkeys(drilled.attributions)) or 'nothing'}; {drilled.pool} condemned for {', '.join(drilled.condemned)}")  # fmt: skip
    if drilled.moved_to:
        proof = {None: "not asked", True: "verified", False: "REFUSED"}[drilled.continuation_verified]  # fmt: skip
        lines.append(f"cost     {drilled.steps_recomputed} steps computed again on {drilled.moved_to} ({', '.join(drilled.rungs)}; continuation {proof}); training again after {_seconds(drilled.recovery_s)}")  # fmt: skip
    if drilled.weights_equal is not None:
        lines.append(f"weights  {'equal' if drilled.weights_equal else 'DIFFER FROM'} those of the undisturbed run")  # fmt: skip
    return [*lines, drilled.verdict]


def table(drills: Sequence[Drilled]) -> list[str]:
    """The truth table: one line a cell."""
    head = ("fault", "fired", "seen at, by", "called", "ladder", "again", "back in", "weights", "")
    rows = [head]
    for one in drills:
        rows.append((
            one.fault, f"{one.fired}x from {one.first_fired_step}" if one.first_fired_step else f"{one.fired}x",
            f"{one.seen[0].step} {one.seen[0].by}" if one.seen else "-", ", ".join(dict.fromkeys(one.attributions)) or "-",
            ", ".join(one.rungs) or "-", str(one.steps_recomputed) if one.moved_to else "-", _seconds(one.recovery_s) if one.moved_to else "-",
            {None: "-", True: "equal", False: "DIFFER"}[one.weights_equal], one.verdict,
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]  # fmt: skip
    good = sum(one.good for one in drills)
    return [*lines, "", f"{good} of {len(drills)} as they should be"]


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _ground_truth(folder: RunFolder, pool: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.ground_truth.glob(f"{pool}-*.jsonl"))
        if not path.name.endswith("-qualify.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def _sightings(records: Sequence[AnyRecord], began_s: float) -> list[Sighting]:
    found = []
    for one in records:
        after_s = max(0.0, one.time_s - began_s)
        if isinstance(one, Alarm):
            found.append(Sighting(one.step, one.sentinel, one.detail, after_s))
        elif isinstance(one, Incident) and one.sentinel.startswith("watchdog"):
            found.append(Sighting(one.step, one.sentinel, one.evidence.splitlines()[0], after_s))
        elif isinstance(one, PoolCondemned) and one.role == "infer":
            found.append(Sighting(None, "the supervisor", one.reason.splitlines()[0], after_s))
        elif isinstance(one, Warned) and one.what in TELLING:
            found.append(Sighting(one.step, one.what, one.detail.splitlines()[0], after_s))
    return found


def _recovery_s(records: Sequence[AnyRecord]) -> float | None:
    """The longest wait from an incident that ended a launch to the next committed step."""
    since: float | None = None
    longest: float | None = None
    for one in records:
        if isinstance(one, Incident) and one.rollback and since is None:
            since = one.time_s
        elif isinstance(one, StepStats) and since is not None:
            longest, since = max(longest or 0.0, one.time_s - since), None
    return longest
