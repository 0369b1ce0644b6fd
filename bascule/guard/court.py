"""What follows from an attribution: commit, discard, roll back, condemn or stop. Every outcome is an incident before it acts.

persistent chip fault, software    ChipCondemned
transient chip fault               discard and compute again, where every step since the last certified snapshot was checked;
                                   else RollbackNeeded. Too many strikes: ChipCondemned
data                               the batch is left out
optimisation, unknown              a finite step is real and commits, a step that is not finite is left out; but while
                                   unchecked steps lie behind, those are suspected first: RollbackNeeded
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from bascule.config.trust import GuardConfig
from bascule.errors import ChipCondemned, GuardStopped, RollbackNeeded
from bascule.guard.casebook import Casebook
from bascule.guard.proposal import StepProposal
from bascule.guard.replay import Finding
from bascule.guard.sentinels import Cry

DIVERGED_AFTER = 3
"""Refused steps in a row that are the optimisation's fault before training is stopped: the weights are beyond saving."""


@dataclass(frozen=True)
class Case:
    """A suspicious step after its investigation. `unchecked`: steps since the last certified snapshot that ran unchecked;
    `state_is_hit`: the weights themselves are wrong, not only this step; `probation`: every step is being checked anyway."""

    proposal: StepProposal
    model: nn.Module
    cry: Cry
    finding: Finding
    unchecked: int
    state_is_hit: bool
    probation: bool


class Court:
    """Settles cases of one pool. Remembers refused steps and how many refusals came in a row."""

    def __init__(self, config: GuardConfig, book: Casebook) -> None:
        self.config = config
        self.book = book
        self.refused: set[int] = set()
        self._diverging = 0

    def settle(self, case: Case) -> bool:
        """May the step commit after all? Raises what the top of the file says."""
        finding = case.finding
        if case.state_is_hit:
            finding.evidence = f"{case.cry.detail}. Replayed from these weights: {finding.evidence}"
            if not finding.attribution.endswith("chip fault"):
                finding.attribution = "transient chip fault"
        match finding.attribution:
            case "transient chip fault":
                return self._transient(case)
            case "persistent chip fault" | "software":
                raise self._condemn(case)
            case "data":
                self._record(case, "the batch is left out")
                self.refused.add(case.proposal.step)
                return False
        return self._nobodys_fault(case)

    def accepted(self) -> None:
        """A step passed: refusals are not in a row any more."""
        self._diverging = 0

    def _transient(self, case: Case) -> bool:
        step, before = case.proposal.step, self.book.strike_steps()
        strikes, allowed = len({*before, step}), self.config.transient_strikes
        if strikes >= allowed or before.count(step) >= allowed:
            case.finding.evidence += f"; strike {strikes} of {allowed}"
            raise self._condemn(case)
        if case.unchecked == 0 and not case.state_is_hit:
            self._record(
                case,
                "the step is discarded and computed again; every step since the last certified snapshot was checked",
            )
            return False
        raise self._roll_back(
            case,
            f"back to the last certified snapshot on the same pool; {case.unchecked} steps since then ran unchecked",
        )

    def _nobodys_fault(self, case: Case) -> bool:
        """This step is right on every chip, so it is not to blame here and now. But all of them began from weights that
        unchecked steps made: while there are such steps the past is suspected first."""
        if case.unchecked and not case.probation:
            case.finding.attribution = "unknown"
            case.finding.evidence += (
                f"; {case.unchecked} unchecked steps made these weights and may have spoilt them"
            )
            raise self._roll_back(
                case,
                "back to the last certified snapshot; every step since is computed again and checked",
            )
        proposal = case.proposal
        if math.isfinite(proposal.loss) and math.isfinite(proposal.grad_norm):
            self._record(case, "committed: the step is real")
            return True
        self._diverging += 1
        self.refused.add(proposal.step)
        number = self._record(case, "the step is left out")
        if self._diverging >= DIVERGED_AFTER:
            raise GuardStopped(
                f"{self._diverging} steps in a row up to {proposal.step} have no finite loss or gradient, and the chip is not to blame "
                f"(incident {number}). Lower the learning rate, or start from an older snapshot with other data."
            )
        return False

    def _condemn(self, case: Case) -> ChipCondemned:
        number = self._record(case, "pool condemned for training", rollback=True)
        return ChipCondemned(
            f"{self._where(case)}: {case.finding.attribution}; {case.finding.evidence}.",
            incident_id=number,
        )

    def _roll_back(self, case: Case, action: str) -> RollbackNeeded:
        number = self._record(case, action, rollback=True)
        return RollbackNeeded(
            f"{self._where(case)}: {case.finding.evidence}. {action.capitalize()}.",
            incident_id=number,
        )

    def _record(self, case: Case, action: str, *, rollback: bool = False) -> str:
        return self.book.incident(
            case.proposal, case.model, case.cry, case.finding, action, rollback=rollback
        )

    def _where(self, case: Case) -> str:
        return f"Step {case.proposal.step} on pool {self.book.pool}"
