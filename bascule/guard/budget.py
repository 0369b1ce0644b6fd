"""What watching costs and what it buys: intervals from a budget, detection probability from intervals. Pure; no torch.

A budget is a share of the step's own time, in percent. Costs are measured in the run (a checked step against unchecked ones, an
audit by the clock), so the same recipe watches more closely on a chip where watching is cheap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median

from bascule.config.trust import GuardConfig
from bascule.guard.candidates import products_needed

CHECKSUM_SHARE = 2 / 3
"""Of what looking may cost, the rest is for audits. Checksums see every product of a step, an audit one part of the model."""

AIM = 0.9
MOST, LEAST = 0.6, 0.4
"""The whole guard aims at this share of its budget. What is always on and the witnesses of snapshots come first, looking gets what they leave,
between these shares: where the rest is dear (a small model on a CPU) the budget is exceeded rather than the run left unwatched."""

PLAIN_STEPS, CHECKED_STEPS, AUDITS = 5, 3, 2
"""Prices that are needed before intervals follow from them: one that a busy machine blurred would hold for the whole launch."""

LONGEST = 10_000


@dataclass(frozen=True)
class Intervals:
    """Every how many steps. 1 is every step."""

    checksum: int
    audit: int


FIRST = Intervals(128, 512)
"""Until the prices are known: on a small model on a CPU, the dearest there is, some 0.8 % of the step time. An audit does a whole update
again, so where the batch is small it doubles its step whatever the model's size: every 512th keeps to its share of the default."""


@dataclass(frozen=True)
class Measured:
    """Seconds seen so far: unwatched steps, steps under checksums, audits' own time, what is always on; and of the witnesses of
    snapshots altogether, in `steps` steps."""

    plain_s: tuple[float, ...] = ()
    checked_s: tuple[float, ...] = ()
    audit_s: tuple[float, ...] = ()
    always_s: tuple[float, ...] = ()
    witnesses_s: float = 0.0
    steps: int = 0

    def plain(self, seconds: float) -> Measured:
        return replace(self, plain_s=(*self.plain_s, seconds)[-32:])

    def always(self, seconds: float, witness_s: float) -> Measured:
        return replace(
            self,
            always_s=(*self.always_s, seconds)[-32:],
            witnesses_s=self.witnesses_s + witness_s,
            steps=self.steps + 1,
        )

    def checked(self, seconds: float) -> Measured:
        return replace(self, checked_s=(*self.checked_s, seconds)[-8:])

    def audited(self, seconds: float) -> Measured:
        return replace(self, audit_s=(*self.audit_s, seconds)[-8:])

    @property
    def complete(self) -> bool:
        return (
            len(self.plain_s) >= PLAIN_STEPS
            and len(self.checked_s) >= CHECKED_STEPS
            and len(self.audit_s) >= AUDITS
        )


def intervals(budget_percent: float, seen: Measured) -> Intervals:
    """The shortest intervals that keep to the budget. `seen` must be complete."""
    plain = median(seen.plain_s)
    checked = max(median(seen.checked_s) - plain, 0.0)
    budget = budget_percent / 100.0 * plain
    rest = median(seen.always_s or (0.0,)) + seen.witnesses_s / max(1, seen.steps)
    looking = min(max(AIM * budget - rest, LEAST * budget), MOST * budget)
    return Intervals(
        _every(checked, looking * CHECKSUM_SHARE),
        _every(median(seen.audit_s), looking * (1 - CHECKSUM_SHARE)),
    )


def _every(cost_s: float, allowed_s: float) -> int:
    return max(1, min(LONGEST, math.ceil(cost_s / allowed_s))) if allowed_s > 0 else LONGEST


class Schedule:
    """The intervals of one launch: what the recipe sets holds, the budget decides the others once their prices are known."""

    def __init__(self, config: GuardConfig) -> None:
        self._config, self._measured = config, Measured()
        self._full = config.budget_percent == "full"
        self.every = Intervals(1, 1) if self._full else self._asked(FIRST)
        self.settled = self._full or None not in (
            config.checksum_every_steps,
            config.audit_every_steps,
        )

    def learn(
        self,
        *,
        plain_s: float = 0.0,
        checked_s: float = 0.0,
        audit_s: float = 0.0,
        always_s: float = 0.0,
        witness_s: float = 0.0,
    ) -> bool:
        """What one step cost, by its kind, and what the guard took of it whatever its kind; True when the intervals were settled by
        that."""
        if self.settled:
            return False
        self._measured = self._measured.always(always_s, witness_s)
        if audit_s:
            self._measured = self._measured.audited(audit_s)
        elif checked_s:
            self._measured = self._measured.checked(checked_s)
        elif plain_s:
            self._measured = self._measured.plain(plain_s)
        if self._measured.complete:
            assert isinstance(self._config.budget_percent, float)
            self.every = self._asked(intervals(self._config.budget_percent, self._measured))
            self.settled = True
        return self.settled

    def _asked(self, affordable: Intervals) -> Intervals:
        return Intervals(
            self._config.checksum_every_steps or affordable.checksum,
            self._config.audit_every_steps or affordable.audit,
        )


def steps_to_see(chance_per_step: float, confidence: float = 0.95) -> int:
    """Steps until something that is caught with `chance_per_step` at each step has been caught with `confidence`."""
    if chance_per_step >= 1.0:
        return 1
    if chance_per_step <= 0.0:
        return LONGEST
    return math.ceil(math.log1p(-confidence) / math.log1p(-chance_per_step))


def unseen(every: Intervals, wrong_steps: int) -> float:
    """The chance that no product of `wrong_steps` wrong steps is looked at, when they fall where they like: then a certificate may
    cover what they left in the weights."""
    return (1.0 - 1.0 / every.checksum) ** wrong_steps


def persistent_steps(every: Intervals, parts: int) -> int:
    """Steps within which a part that is always wrong, whatever its operator, has been audited for sure: a whole round of turns."""
    return every.audit * parts


def coverage(every: Intervals, parts: int, rule_out_rate: float) -> str:
    """In words: what these intervals see, and how soon. `parts`: pieces of the model that audits take in turns; `rule_out_rate`: of
    wrong products, what a certificate rules out."""
    one_off = 1.0 - unseen(every, 1)
    now_and_then = steps_to_see(0.1 / every.checksum)
    return (
        f"every product is checked every {_steps(every.checksum)}, one of {parts} parts is audited every {_steps(every.audit)}: "
        f"a product that is always wrong is seen within {_steps(every.checksum)}, one wrong at a tenth of the steps within "
        f"{_steps(now_and_then)} with 95 %, a single wrong product with {one_off:.0%} "
        f"(so a one-off may be certified with {unseen(every, 1):.0%}); a snapshot is certified once {products_needed(rule_out_rate)} "
        f"products checked after it rule out, with 95 %, a lasting fault that strikes one in {1 / rule_out_rate:.0f}, or once every "
        f"product before it was checked; a part whose other operators are always wrong is seen "
        f"within {_steps(persistent_steps(every, parts))}; and all of them, where they last, by the next certification"
    )


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
