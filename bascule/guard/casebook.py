"""What the guard writes down, and what it reads of earlier launches: alarms, incidents, strikes, probation.

An incident's folder is written before its record, so a record never points at nothing.
"""

from __future__ import annotations

import math
from typing import TypeGuard

from torch import nn

from bascule.folder import RunFolder
from bascule.guard import budget, incident
from bascule.guard.budget import Intervals
from bascule.guard.proposal import StepProposal
from bascule.guard.replay import Finding
from bascule.guard.sentinels import Cry
from bascule.ledger import Ledger
from bascule.records import (
    Alarm,
    Coverage,
    Incident,
    Judgement,
    PoolReadmitted,
    ProductsChecked,
    SnapshotEvent,
    SnapshotState,
)

REFUSED = ("data", "transient chip fault", "persistent chip fault", "software")
"""Attributions after which the step did not commit."""


class Casebook:
    """One pool's entries in the run's ledger. `accelerator` and `referee` are names, for the incident files."""

    def __init__(
        self,
        ledger: Ledger,
        folder: RunFolder,
        pool: str,
        *,
        accelerator: str,
        referee: str,
        incidents_gib: float = math.inf,
    ) -> None:
        self.ledger = ledger
        self.folder = folder
        self.pool = pool
        self.accelerator = accelerator
        self.referee = referee
        self.incidents_gib = incidents_gib

    def alarm(self, step: int, cry: Cry) -> None:
        self.ledger.append(
            Alarm(step=step, sentinel=cry.sentinel, measured=cry.measured, bound=cry.bound, detail=cry.detail)
        )  # fmt: skip

    def suspect(
        self, step: int, sentinel: str, measured: float, detail: str, bound: float = 1.0
    ) -> Cry:
        """Record an alarm that calls for replays, and return it."""
        cry = Cry(sentinel, measured if math.isfinite(measured) else None, bound, detail)
        self.alarm(step, cry)
        return cry

    def audited(self, step: int, reason: str) -> None:
        self.ledger.append(Judgement(step=step, commit=True, reason=reason))

    def coverage(self, step: int, every: Intervals, parts: int, rule_out_rate: float) -> None:
        self.ledger.append(
            Coverage(
                step=step, checksum_every=every.checksum, audit_every=every.audit, parts=parts, one_off_unseen=budget.unseen(every, 1),
                persistent_steps=budget.persistent_steps(every, parts), detail=budget.coverage(every, parts, rule_out_rate),
            )
        )  # fmt: skip

    def checked(self, step: int, products: int) -> None:
        self.ledger.append(ProductsChecked(step=step, products=products, steps=1))

    def snapshot(
        self, step: int, state: SnapshotState, name: str, sha256: str, reason: str
    ) -> None:
        self.ledger.append(
            SnapshotEvent(step=step, state=state, path=f"snapshots/{name}", sha256=sha256, reason=reason)
        )  # fmt: skip

    def incident(
        self, proposal: StepProposal, model: nn.Module, cry: Cry, finding: Finding, action: str,
        *, rollback: bool = False,
    ) -> str:  # fmt: skip
        """Write the incident's folder and records; returns its id. `model` holds the weights before the step; `rollback`: the
        launch ends over it."""
        number = incident.new_id(self.folder.incidents, proposal.step)
        incident.write(
            self.folder.incidents / number,
            self._told(number, proposal, cry, finding, action),
            model=model.state_dict(),
            batch=proposal.batch.tensors,
            gradients=finding.gradients,
            product=finding.product,
        )
        record = Incident(
            incident_id=number,
            step=proposal.step,
            sentinel=cry.sentinel,
            attribution=finding.attribution,
            action=action,
            evidence=finding.evidence,
            replays=tuple(finding.replays),
            folder=f"incidents/{number}",
            pool=self.pool,
            rollback=rollback,
        )
        self.ledger.append(record)
        if finding.attribution in REFUSED:
            reason = f"{finding.attribution}: {action}"
            self.ledger.append(Judgement(step=proposal.step, commit=False, reason=reason))
        self._make_room()
        return number

    def _make_room(self) -> None:
        dropped = incident.make_room(self.folder.incidents, self.incidents_gib * 2**30)
        if dropped:
            names = ", ".join(folder.name for folder in dropped)
            self.ledger.warn("incidents over their budget", f"weights and gradients of {names} were deleted: guard.incidents_gib allows {self.incidents_gib:g}. Their story, batch and product stay")  # fmt: skip

    def _told(
        self, number: str, proposal: StepProposal, cry: Cry, finding: Finding, action: str
    ) -> dict[str, object]:
        return {
            "incident_id": number,
            "step": proposal.step,
            "phase": proposal.phase,
            "attempt": proposal.attempt,
            "pool": self.pool,
            "accelerator": self.accelerator,
            "referee": self.referee,
            "sentinel": cry.sentinel,
            "cry": cry.detail,
            "loss": proposal.loss if math.isfinite(proposal.loss) else str(proposal.loss),
            "attribution": finding.attribution,
            "evidence": finding.evidence,
            "action": action,
            "first_operator": finding.operator,
            "violations": [str(violation) for violation in finding.violations],
            "replays": [replay.model_dump() for replay in finding.replays],
        }

    def strike_steps(self) -> list[int]:
        """Steps of transient faults of this pool since it was last readmitted, in order; a step may come more than once."""
        steps: list[int] = []
        for record in self.ledger.read():
            if isinstance(record, PoolReadmitted) and record.pool == self.pool:
                steps.clear()
            if self._is_mine(record) and record.attribution == "transient chip fault":
                steps.append(record.step)
        return steps

    def probation_end(self) -> int | None:
        """After a transient fault, or an alarm nothing explains, every step is checked until a snapshot of that step or a later
        one is certified. Returns that step, None when the pool is under no probation."""
        end: int | None = None
        for record in self.ledger.read():
            if self._is_mine(record) and record.attribution in ("transient chip fault", "unknown"):
                end = max(record.step, end or 0)
            if (
                isinstance(record, SnapshotEvent)
                and record.state == "certified"
                and record.step >= (end or 0)
            ):
                end = None
        return end

    def _is_mine(self, record: object) -> TypeGuard[Incident]:
        """An incident that a guard wrote about this pool (the supervisor's own begin with `watchdog`)."""
        return (
            isinstance(record, Incident)
            and record.pool == self.pool
            and not record.sentinel.startswith("watchdog")
        )
