"""From a snapshot to a certificate: the step after it is its witness, what is checked afterwards is its evidence (DESIGN section 2.4).

A snapshot is *pending* until the next step, then *witnessed* when the referee agrees with that step, or some of its sequences, and
*certified* once a fault that was there before it would have shown since (candidates.py). guard.py says when; here is how.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bascule import draws
from bascule.accelerators.base import Accelerator
from bascule.config.trust import GuardConfig
from bascule.guard.candidates import Candidate, Candidates
from bascule.guard.casebook import Casebook
from bascule.guard.noise import NoiseFloor
from bascule.guard.proposal import Recomputer, StepProposal
from bascule.guard.replay import Again, again, some_sequences
from bascule.guard.sentinels import Cry


class Snapshots(Protocol):
    """What the guard needs of snapshots: train/writer, which does it once the snapshot is on disk, or train/checkpoint, which
    does it at once (a module can be a Protocol's implementation)."""

    def witness(
        self, path: Path, proposal: Any, reason: str, done: Callable[[str], None]
    ) -> None: ...

    def certify(self, path: Path, reason: str, done: Callable[[str], None]) -> None: ...


@dataclass(frozen=True)
class Pending:
    """A snapshot that waits for the step that follows it, its witness."""

    step: int
    path: Path


class Certification:
    """The snapshots of one launch that are on their way to a certificate. `candidates` is what an earlier launch left waiting."""

    def __init__(
        self,
        config: GuardConfig,
        book: Casebook,
        floor: NoiseFloor,
        referee: Accelerator,
        snapshots: Snapshots,
        candidates: Candidates,
    ) -> None:
        self.config = config
        self.book = book
        self.floor = floor
        self.referee = referee
        self.snapshots = snapshots
        self.candidates = candidates
        self.pending: Pending | None = None
        self.probation_until = book.probation_end()
        self._latest: Pending | None = None

    @property
    def on_probation(self) -> bool:
        """Until a snapshot of after the alarm is certified every step runs under checksums."""
        return self.probation_until is not None

    def add(self, step: int, path: Path) -> None:
        """A new snapshot: the next step is its witness, where it is wanted as a candidate."""
        self._latest = Pending(step, path)
        self.pending = self._latest if self.candidates.wants_another else None

    def want_the_latest(self) -> None:
        """The run's last snapshot is wanted whether or not others wait: nothing comes after it."""
        self.pending = self._latest

    def skipped(self) -> None:
        """A step was committed that nothing checked."""
        self.candidates = self.candidates.skipped()

    def count(self, step: int, products: Sequence[int]) -> None:
        """So many products were right: that speaks for the snapshots that wait."""
        if sum(products):
            self.candidates = self.candidates.checked(sum(products))
            self.book.checked(step, sum(products))

    def probe(self, proposal: StepProposal, stepper: Recomputer, *, checked: bool) -> Again:
        """The step that follows the snapshot, or some of its sequences, on the chip with every product checked; the proposal
        itself where it was `checked` and is small."""
        assert self.pending is not None
        key = draws.key(self.pending.step, "guard.certify")
        batch = some_sequences(proposal.batch, self.config.certify_sequences, key)
        if batch is proposal.batch and checked:
            return Again(proposal)
        return again(stepper, batch, proposal.attempt)

    def witness(self, probe: Again, stepper: Recomputer) -> list[Cry]:
        """Hold the probe against the referee. Equal: the probe is the snapshot's witness, and what is due is certified."""
        assert self.pending is not None
        proposal = probe.proposal
        for violation in probe.violations[:1]:
            return [self.book.suspect(proposal.step, "checksum", violation.ratio, str(violation))]
        right = stepper.recompute(proposal.batch, self.referee, 0)
        found = self.floor.compare(proposal, right, stepper)
        if not found.agrees:
            return [
                self.book.suspect(
                    proposal.step, "certification", found.error, found.detail, found.bound
                )
            ]
        step, path = self.pending.step, self.pending.path
        reason = f"{_sequences(proposal.batch)} sequences of step {proposal.step} replayed on {self.referee.name}: {found.detail}; no alarm is open"
        self.snapshots.witness(
            path,
            proposal,
            reason,
            lambda sha256: self.book.snapshot(step, "witnessed", path.name, sha256, reason),
        )
        self.candidates = self.candidates.witnessed(step, path)
        self.pending = None
        self.certify_due()
        return []

    def certify_due(self) -> None:
        """Certify what has waited long enough, oldest first (candidates.py)."""
        while (one := self.candidates.due()) is not None:
            self.candidates = self.candidates.certified(one)
            self.snapshots.certify(one.path, one.says, functools.partial(self._certified, one))
            if self.probation_until is not None and one.step >= self.probation_until:
                self.probation_until = None

    def _certified(self, one: Candidate, sha256: str) -> None:
        self.book.snapshot(one.step, "certified", one.path.name, sha256, one.says)


def _sequences(batch: Any) -> int:
    return len(next(iter(batch.tensors.values())))
