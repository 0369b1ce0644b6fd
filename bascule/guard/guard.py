"""The judge of every step: watches, suspects, replays, attributes, and certifies snapshots (DESIGN sections 2.2 to 2.5).

What it may answer:  True, commit; False, discard (the loop tries again, and leaves the batch out when it is refused for good);
RollbackNeeded, the chip erred once and unchecked steps may be corrupt; ChipCondemned, the chip is proven guilty;
GuardStopped, the training itself has diverged. Every alarm and its outcome are in the ledger before anything is raised.

The guard knows neither the trainer nor its files: what it needs of them are Protocols (proposal.py, certification.py), handed in by
the stage.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bascule.accelerators.base import Accelerator
from bascule.config.trust import GuardConfig
from bascule.folder import RunFolder
from bascule.guard import audit, drift, host, sentinels, update
from bascule.guard.backwards import Older
from bascule.guard.budget import Intervals, Schedule
from bascule.guard.candidates import products_needed, recalled
from bascule.guard.casebook import Casebook
from bascule.guard.certification import Certification, Snapshots
from bascule.guard.checksum import Violation
from bascule.guard.court import Case, Court
from bascule.guard.hindsight import earlier_steps, first_difference
from bascule.guard.noise import Difference, NoiseFloor
from bascule.guard.observer import Observer
from bascule.guard.proposal import Recomputer, StepProposal
from bascule.guard.repeats import Repeats
from bascule.guard.replay import REPEATS, again, investigate
from bascule.guard.sentinels import Cry, Seen, Watch
from bascule.ledger import Ledger
from bascule.records import StepStats

REMEMBERED_BATCHES = 2

RARE_REPEATS = 8
"""Replays here of what was wrong in one of many equal steps: a fault that strikes one in five is met again with 83 %."""

MEMORY_EVERY = 4
"""Steps between looks at the memory in use: a leak lasts, and on a CPU a look costs as much as the other sentinels together."""


@dataclass
class Spent:
    """Seconds of one step: its own forward and backward, and the judge's. `step_s` 0.0 where it is not known."""

    step_s: float = 0.0
    audit_s: float = 0.0
    witness_s: float = 0.0
    always_s: float = 0.0


class Guard:
    """One per launch of a trainer. Implements train's Judge.

    `accelerator`: the chip under watch, for its memory figures and to know whether the referee is of the same kind.
    `referee`: another kind of chip wherever there is one. `sibling` opens another chip of the pool, if it has one, for replays; `older`
    gives the snapshots before a step of a phase, from the newest certified one on.
    """

    def __init__(
        self,
        config: GuardConfig,
        ledger: Ledger,
        folder: RunFolder,
        pool: str,
        *,
        accelerator: Accelerator,
        referee: Accelerator,
        snapshots: Snapshots,
        experts_per_token: int = 1,
        sibling: Callable[[], Accelerator | None] = lambda: None,
        older: Callable[[int, str], Sequence[Older]] = lambda *_: (),
    ) -> None:
        self.config = config
        self.sibling = sibling
        self.older = older
        self.pool = pool
        self.accelerator = accelerator
        self.referee = referee
        self.floor = NoiseFloor(referee)
        self.schedule = Schedule(config)
        self._watch = Watch.begin(
            (
                *sentinels.standard(config.spike_sigma, experts_per_token=experts_per_token),
                *drift.standard(),
            )
        )
        self._recent: deque[Any] = deque(maxlen=REMEMBERED_BATCHES)
        self.book = Casebook(
            ledger,
            folder,
            pool,
            accelerator=accelerator.name,
            referee=referee.name,
            incidents_gib=config.incidents_gib,
        )
        self.court = Court(config, self.book)
        self._parts: list[audit.Part] = []
        self._observer = Observer()
        waiting = recalled(
            ledger.read(), pool, folder.snapshots, products_needed(config.rule_out_rate)
        )
        self.certification = Certification(
            config, self.book, self.floor, referee, snapshots, waiting
        )
        self._judged = False
        self._plays = False
        self._spent: Spent | None = None
        self._earlier = earlier_steps(ledger.read()) if self._same_kernels() else {}

    def remember(self, stats: Sequence[StepStats], batches: Sequence[Any] = ()) -> None:
        """Go on as if this launch had judged the steps that led to the resumed snapshot, so that it cries where an
        uninterrupted one would. `stats`: the committed steps, oldest first; `batches`: the last of them, to tell bad data from
        diverged weights. Only the spike sentinels have a memory that decides; the others' warnings start anew."""
        for one in stats:
            if one.tokens:  # an empty step is committed unjudged
                seen = Seen(
                    step=one.step, phase=one.phase, loss=one.loss, grad_norm=one.grad_norm, seconds=0.0, tokens=one.tokens,
                    layers=one.layer_grad_norms,
                )  # fmt: skip
                self._watch = self._watch.accept(seen)
        self._recent.extend(batches)

    # ---- watching

    def watches(self, step: int) -> bool:
        """Does `step` run under checksums? Every n-th, and all of them under probation."""
        return self.certification.on_probation or step % self.every.checksum == 0

    def audits(self, step: int) -> bool:
        return step % self.every.audit == 0

    def looks(self, step: int) -> bool:
        """At the operators or a part of this step, which must then not be played back from a recording."""
        return self.watches(step) or self.audits(step)

    @property
    def every(self) -> Intervals:
        return self.schedule.every

    @property
    def watched(self) -> str:
        """What was looked at in the last step beside what always is: products, a part, both, or an empty string."""
        return self._observer.watched

    def watch(self, step: int, phase: str, model: nn.Module) -> AbstractContextManager[None]:
        """Entered around a step's forward and backward inside the chip's session; with phase `commit`, around its update; with
        phase `score`, around a forward whose result becomes data."""
        products = self.watches(step)
        match phase:
            case "score":
                return self._observer.score(model)
            case "commit":
                return self._commit(step, model, products)
        part = None
        if self.audits(step):
            self._parts = self._parts or audit.parts(model)
            part = audit.turn(self._parts, step // self.every.audit)
        return self._observer.step(step, model, products=products, part=part)

    @contextmanager
    def _commit(self, step: int, model: nn.Module, products: bool) -> Iterator[None]:
        """The update is part of what a step takes, and under checksums of what they cost: where the batch is small, the most of both.
        The chip is waited for only while prices are being learned."""
        if self.schedule.settled or self._spent is None:
            with self._observer.commit(step, model, products=products):
                yield
            return
        self.accelerator.synchronize()
        start = host.own_time_s()
        with self._observer.commit(step, model, products=products):
            yield
        self.accelerator.synchronize()
        self._price(step, max(0.0, host.own_time_s() - start))

    # ---- judging

    def judge(self, proposal: StepProposal, stepper: Recomputer) -> bool:
        """May this step commit? See the top of the file for what it raises."""
        if not proposal.grads:
            return True
        if proposal.step in self.court.refused:
            return False
        if not self._judged:
            self._parts = self._parts or audit.parts(stepper.model)
            self._tell_coverage(proposal.step)
        self._judged = True
        spent, start = Spent(self._own_seconds(proposal)), host.own_time_s()
        seen = self._seen(proposal)
        watch, cries = self._watch.fold(seen)
        for cry in cries:
            self.book.alarm(proposal.step, cry)
        products = self._observer.products()
        self._observer.kept = stepper.kept
        spoilt = [
            self.book.suspect(one.step, one.sentinel, one.measured, one.detail, one.bound)
            for one in self._observer.breaks(proposal.step, stepper.model)
        ]
        if proposal.unlike:  # steps before this one were played back from it
            spoilt.append(self.book.suspect(proposal.step, "recording", math.inf, proposal.unlike))
        violations = self._observer.violations()
        suspicions = [*spoilt, *(cry for cry in cries if cry.suspect)]
        suspicions += [
            self.book.suspect(proposal.step, "checksum", v.ratio, str(v)) for v in violations[:1]
        ]
        begin = host.own_time_s()
        suspicions += self._audit(proposal)
        spent.audit_s = host.own_time_s() - begin
        if not suspicions:
            self.certification.count(proposal.step, products)
        begin = host.own_time_s()
        if not suspicions and self.certification.pending is not None:
            probe = self.certification.probe(proposal, stepper, checked=self._observer.checked)
            suspicions += self.certification.witness(probe, stepper)
            if suspicions:
                proposal, violations = probe.proposal, probe.violations
        if suspicions:
            return self._settle(proposal, stepper, seen, suspicions[0], violations, bool(spoilt))
        spent.witness_s = host.own_time_s() - begin
        self.certification.certify_due()
        self._accept(proposal, watch)
        self._observer.reach = stepper.reach(proposal)
        if self._observer.capture is not None:
            begin, measure = host.own_time_s(), not self._same_kernels()
            self._observer.expected = update.expect(
                proposal, stepper, self.referee, measure=measure
            )
            spent.audit_s += host.own_time_s() - begin
        looked_s = spent.audit_s + spent.witness_s
        spent.always_s = max(0.0, host.own_time_s() - start - looked_s)
        self._spent = spent
        return True

    def _accept(self, proposal: StepProposal, watch: Watch) -> None:
        self._watch = watch
        self.court.accepted()
        if self._earlier:
            self._look_back(proposal)
        self.certification.pending = None
        self._observer.accepted()
        if not self._observer.checked:
            self.certification.skipped()
        if self._recent and self._recent[-1].phase != proposal.phase:
            self._recent.clear()
        self._recent.append(proposal.batch)

    def _look_back(self, proposal: StepProposal) -> None:
        """Record the first repeated step that comes out differently; after it all later ones do."""
        told = first_difference(self._earlier, proposal.step, proposal.loss, proposal.grad_norm)
        if told is not None:
            self.book.audited(proposal.step, f"hindsight: {told}")
        if told is not None or proposal.step >= max(self._earlier):
            self._earlier = {}

    def _own_seconds(self, proposal: StepProposal) -> float:
        """Without what the host's scheduler withheld; 0.0, not known, where pages came back from a disk meanwhile."""
        if self._observer.paged:
            return 0.0
        return max(0.0, proposal.seconds - self._observer.withheld_s)

    def _time_counts(self, proposal: StepProposal) -> bool:
        """Does this step's time say anything about the chip? Not when it was watched or went operator by operator where others are played
        back (slower by design), and not on a host that runs more processes than it has cores."""
        self._plays = self._plays or proposal.played
        if self._observer.slowed or (self._plays and not proposal.played):
            return False
        return self.accelerator.device.type != "cpu" or os.getloadavg()[0] <= (os.cpu_count() or 1)

    def _price(self, step: int, commit_s: float) -> None:
        """Learn what watching costs here, from the step that was judged last and the update that followed it."""
        assert self._spent is not None
        spent, self._spent = self._spent, None
        step_s = spent.step_s and spent.step_s + commit_s - self._observer.own_s
        kind = "plain_s"
        if self._observer.capture is not None:
            kind, step_s = "audit_s", spent.audit_s
        elif self._observer.checked:
            kind = "checked_s"
        always_s = spent.always_s + self._observer.own_s
        prices = {kind: step_s, "always_s": always_s, "witness_s": spent.witness_s}
        if self.schedule.learn(**prices):
            self._tell_coverage(step)

    def _tell_coverage(self, step: int) -> None:
        self.book.coverage(step, self.every, len(self._parts), self.config.rule_out_rate)

    def _seen(self, proposal: StepProposal) -> Seen:
        loads = proposal.expert_loads
        due = proposal.step % MEMORY_EVERY == 0
        memory = self.accelerator.memory().allocated_bytes if due else None
        return Seen(
            step=proposal.step,
            phase=proposal.phase,
            loss=proposal.loss,
            grad_norm=proposal.grad_norm,
            seconds=proposal.seconds if self._time_counts(proposal) else 0.0,
            tokens=proposal.tokens,
            loads=[] if loads is None else loads.tolist(),
            metrics=proposal.metrics,
            memory_bytes=None if memory is None else float(memory),
            own_seconds=self._own_seconds(proposal),
            watched=self._observer.watched or ("played" if proposal.played else ""),
            layers=tuple(proposal.layer_grad_norms.values()),
            layer_names=tuple(proposal.layer_grad_norms),
        )

    def _audit(self, proposal: StepProposal) -> list[Cry]:
        if self._observer.capture is None:
            return []
        finding = audit.judge(
            self._observer.capture, proposal.grads, self.referee, key=proposal.step
        )
        if finding is None:
            return []
        if finding.worst is None:
            how = "equal bit for bit" if finding.bit_equal else "equal within the measured noise"
            self.book.audited(
                proposal.step,
                f"audit of {finding.part} on {self.referee.name}: {finding.tensors} tensors {how}",
            )
            return []
        worst = finding.worst
        return [
            self.book.suspect(
                proposal.step, "audit", worst.error, f"{finding.part}, {worst}", worst.bound
            )
        ]

    # ---- certifying

    def after_snapshot(self, step: int, path: Path) -> None:
        """A snapshot of the present weights lies at `path`: the next step is its witness, where it is wanted as a candidate.

        Called before the first step of a launch, it says that training resumes from a snapshot nobody certified yet.
        """
        if not self._judged and step > 0:
            self.certification.skipped()
        self.certification.add(step, path)

    @property
    def recent(self) -> tuple[Any, ...]:
        """The last batches of this phase that trained well, oldest first."""
        return tuple(self._recent)

    def certify_last(self, propose: Callable[..., Any], batch: Any, stepper: Recomputer) -> bool:
        """Certify the run's last snapshot, after which no step follows: `propose(batch, attempt=n)` computes one that is never
        committed, and as many more follow as the certificate needs. Returns False when the batch is empty or was refused; raises
        as `judge` does."""
        self.court.refused.discard(batch.step)
        self.certification.want_the_latest()
        for attempt in range(2):
            if self.certification.pending is None:
                break
            proposal = propose(batch, attempt=attempt)
            if proposal.grads and self.judge(proposal, stepper):
                others = [one for one in self._recent if one.phase == batch.phase]
                return self._examine(batch.step + 1, others, stepper)
        return False

    def _examine(self, first: int, batches: Sequence[Any], stepper: Recomputer) -> bool:
        """The closing examination: recent batches as steps that were never planned, under full checks, until no snapshot waits."""
        step, allowed = first, 2 * self.certification.candidates.needed
        repeats = Repeats(stepper, self.floor)
        while self.certification.candidates.waiting and step < first + allowed:
            place = step % len(batches)
            one = again(stepper, dataclasses.replace(batches[place], step=step), 0)
            if one.violations:
                worst = one.violations[0]
                cry = self.book.suspect(step, "closing checksum", worst.ratio, str(worst))
                seen = self._seen(one.proposal)
                self._settle(one.proposal, stepper, seen, cry, one.violations, False)
            elif (differs := repeats.wrong_one(place, one.proposal)) is not None:
                self._settle_unlike(*differs, stepper)
            elif not one.products:
                break
            else:
                self.certification.count(step, [one.products])
                self.certification.certify_due()
            step += 1
        return not self.certification.candidates.waiting

    def _settle_unlike(self, proposal: Any, found: Difference, stepper: Recomputer) -> None:
        """What checksums do not cover went wrong: that they covered every step since the last certified snapshot excuses nothing."""
        told = (
            f"the same batch at the same weights had another answer before or after: {found.detail}"
        )
        cry = self.book.suspect(proposal.step, "closing repeat", found.error, told, found.bound)
        self.certification.skipped()
        self._settle(proposal, stepper, self._seen(proposal), cry, [], False, RARE_REPEATS)

    # ---- settling an alarm

    def _settle(
        self,
        proposal: StepProposal,
        stepper: Recomputer,
        seen: Seen,
        cry: Cry,
        violations: list[Violation],
        state_is_hit: bool,
        repeats: int = REPEATS,
    ) -> bool:
        finding = investigate(
            proposal,
            stepper,
            self.floor,
            violations=violations,
            other_batches=tuple(self._recent),
            looks_normal=self._looks_normal,
            same_kind=self._same_kind(),
            sibling=self.sibling,
            older=functools.partial(self.older, proposal.step, proposal.phase),
            repeats=repeats,
        )
        case = Case(
            proposal=proposal,
            model=stepper.model,
            cry=cry,
            finding=finding,
            unchecked=self.certification.candidates.unchecked,
            state_is_hit=state_is_hit,
            probation=self.certification.on_probation,
        )
        if not self.court.settle(case):
            return False
        self._accept(proposal, self._watch.accept(seen))
        return True

    def _looks_normal(self, proposal: StepProposal) -> bool:
        return not any(cry.suspect for cry in self._watch.fold(self._seen(proposal))[1])

    def _same_kind(self) -> bool:
        mine, theirs = self.accelerator.info(), self.referee.info()
        return (mine.vendor, mine.name) == (theirs.vendor, theirs.name)

    def _same_kernels(self) -> bool:
        """Chip and referee run the same code, so that right results are equal bit for bit (a simulated chip on its base)."""
        return self.accelerator.device == self.referee.device
