"""What follows from a launch that did not finish: the incident, the policy's answer, the snapshot to go on from. No torch.

Where to go next is fallback's and place's to say; here it is recorded and carried out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from bascule.config.recipe import Recipe
from bascule.errors import (
    BasculeError,
    CheckFailed,
    DeviceFault,
    GuardStopped,
    NoPoolLeft,
    OutOfMemory,
    Preempted,
    UsageError,
)
from bascule.fallback import migrate, policy
from bascule.folder import RunFolder
from bascule.guard.watchdog import Ending
from bascule.ledger import Ledger, last, of_kind
from bascule.place.placement import place
from bascule.records import (
    AnyRecord,
    Incident,
    Migration,
    Placement,
    PoolCondemned,
    Role,
    SnapshotState,
    StepStats,
    Verdict,
)
from bascule.stages import workers
from bascule.stages.answer import say

Start = Literal["newest", "certified"]
"""Which snapshot the next launch begins with."""

SETBACKS = {
    "ChipCondemned": "condemned",
    "RollbackNeeded": "rollback",
    "ContinuationRefused": "continuation refused",
    "OutOfMemory": "out of memory",
    "OperatorMissing": "operator missing",
    "AcceleratorUnavailable": "accelerator unavailable",
    "DeviceFault": "device error",
    "Hang": "hang",
    "Death": "death",
}
"""Endings that another launch may mend, here or on another pool, and the word of the incident where the worker left none."""


def condemn(ledger: Ledger, pool: str, role: Role, ending: Ending) -> None:
    ledger.append(
        PoolCondemned(pool=pool, role=role, incident_id=ending.incident_id, reason=ending.message)
    )
    say(f"{pool} is condemned for the role {role}: {ending.message.splitlines()[0]}")


class Setbacks:
    def __init__(
        self, recipe: Recipe, folder: RunFolder, ledger: Ledger, should_stop: Callable[[], bool]
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.ledger = ledger
        self.should_stop = should_stop

    def react(self, placement: Placement, ending: Ending) -> Start:
        """Record what an unfinished launch means, and say what the next one begins with; raise when there is no next one."""
        if ending.error == "Preempted":
            raise Preempted(
                "Stopped on request; the last finished step is in a snapshot. Run the same command again to go on."
            )
        if ending.error == "RolloutFailed":
            condemn(self.ledger, placement.infer, "infer", ending)
            return "newest"
        if ending.error in SETBACKS:
            return self._setback(placement.train, ending)
        raise _error_of(ending)

    def settle_unfinished(self) -> Start:
        """A supervisor that was killed between an incident and the rollback it asks for left that to us: without it the trainer
        would start from a snapshot that the incident had made doubtful, and certify it."""
        pending: Incident | None = None
        for record in self.ledger.read():
            if isinstance(record, Incident) and record.rollback:
                pending = record
            elif isinstance(record, Migration):
                pending = None
        if pending is None or pending.pool is None:
            return "newest"
        error = _ending_of(pending)
        say(f"incident {pending.incident_id} asks for a rollback that was not made; it is made now")
        return self._setback(pending.pool, Ending(error, pending.evidence, 5, pending.incident_id))

    def _setback(self, pool: str, ending: Ending) -> Start:
        """A launch failed: leave the incident, ask the policy, go back to the newest certified snapshot. A worker that only died is no
        suspect: it may go on from what it saved last, as after a stop, and its snapshots go on waiting for their certificates."""
        suspected = ending.incident_id is not None
        if ending.incident_id is None:
            ending = replace(ending, incident_id=self._incident(pool, ending).incident_id)
        records = self.ledger.read()
        failed_step = self._failed_step(ending)
        setback = policy.Setback(
            pool, str(ending.error), failed_step, ending.message, ending.incident_id
        )
        try:
            move = policy.next_move(
                records,
                setback,
                lambda out: self._place(records, out),
                siblings=self.recipe.siblings(pool),
            )
        except NoPoolLeft as nothing:
            condemn(self.ledger, pool, "train", ending)
            raise OutOfMemory(str(nothing)) if ending.error == "OutOfMemory" else nothing from None
        for lost in move.condemn:
            why = (
                move.reason
                if lost == pool
                else f"left with the chips of its kind that failed at the same place; last: {move.reason}"
            )
            condemn(self.ledger, lost, "train", replace(ending, message=why))
        start = self._go_back(pool, move, failed_step, suspected=suspected or move.pool != pool)
        until = time.monotonic() + move.wait_s
        while time.monotonic() < until and not self.should_stop():
            time.sleep(workers.POLL_S)
        return start

    def _place(self, records: list[AnyRecord], condemned: frozenset[tuple[str, Role]]) -> Placement:
        return place(
            of_kind(records, Verdict),
            self.recipe.order,
            condemned,
            required=self.recipe.qualify.required,
        )

    def _incident(self, pool: str, ending: Ending) -> Incident:
        """An incident that the worker could not write itself: it was dead, silent, or out of memory."""
        number = len(of_kind(self.ledger.read(), Incident)) + 1
        step = self._last_step() + 1
        word = SETBACKS[str(ending.error)]
        name = f"{number:04d}-{word.replace(' ', '-')}-step-{step}"
        incident = Incident(
            pool=pool,
            incident_id=name,
            step=step,
            sentinel=f"watchdog: {word}",
            attribution=ending.attribution,
            action="back to a snapshot; the policy decides where",
            evidence=ending.message,
            folder=self._keep_stacks(name, ending.stacks) if ending.error == "Hang" else "",
            rollback=True,
        )
        self.ledger.append(incident)
        return incident

    def _keep_stacks(self, incident_id: str, stacks: str) -> str:
        """Every thread's stack at the moment of the hang, in the incident's folder; returns the folder's name in the run."""
        path = self.folder.incidents / incident_id / "stacks.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stacks or "the process did not answer\n", encoding="utf-8")
        return f"incidents/{incident_id}"

    def _go_back(self, pool: str, move: policy.Move, failed_step: int, *, suspected: bool) -> Start:
        """Choose the snapshot to go on from; later ones are rejected. What it costs is recorded."""
        proven = self.recipe.guard.enabled and suspected
        trusted: SnapshotState = "certified" if proven else "verified"
        choice = migrate.choose(self.folder.snapshots, self.ledger, trusted=trusted)
        reached_s = self._reached(choice.step)
        again = max(0, failed_step - 1 - choice.step)
        self.ledger.append(
            Migration(
                pool=move.pool,
                from_pool=pool,
                to_pool=move.pool,
                failed_at_step=failed_step,
                resumed_from_step=choice.step,
                steps_recomputed=again,
                seconds_lost=max(0.0, time.time() - reached_s),
                snapshot=choice.path.name,
                rung=move.rung,
                wait_s=move.wait_s,
                trust=trusted,
            )
        )
        wait = f" in {move.wait_s:.0f} s" if move.wait_s else ""
        say(
            f"{move.rung}: back to step {choice.step} ({trusted}), on {move.pool}{wait}; {again} steps to compute again"
        )
        return "certified" if proven else "newest"

    def _reached(self, step: int) -> float:
        """When the run first stood at `step`."""
        times = [
            record.time_s
            for record in of_kind(self.ledger.read(), StepStats)
            if record.step == step
        ]
        return (
            times[-1]
            if times
            else min((record.time_s for record in self.ledger.read()), default=time.time())
        )

    def _last_step(self) -> int:
        record = last(self.ledger.read(), StepStats)
        return record.step if record else 0

    def _failed_step(self, ending: Ending) -> int:
        for incident in reversed(of_kind(self.ledger.read(), Incident)):
            if incident.incident_id == ending.incident_id:
                return incident.step
        return self._last_step() + 1


def _ending_of(incident: Incident) -> str:
    """Which ending left this incident: the reverse of SETBACKS for the supervisor's own, the attribution for the guard's."""
    words = {word: error for error, word in SETBACKS.items()}
    own = words.get(incident.sentinel.removeprefix("watchdog: "))
    if incident.sentinel.startswith("watchdog: ") and own:
        return own
    guilty = incident.attribution in ("persistent chip fault", "software")
    return "ChipCondemned" if guilty else "RollbackNeeded"


def _error_of(ending: Ending) -> BasculeError:
    """The error the run ends with, for endings that no other pool would change."""
    by_code: dict[int, type[BasculeError]] = {
        2: UsageError,
        3: CheckFailed,
        4: GuardStopped,
        5: DeviceFault,
        6: OutOfMemory,
    }
    return by_code.get(ending.exit_code, BasculeError)(ending.message)
