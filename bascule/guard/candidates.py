"""When may a snapshot be certified? Only once a fault that was there before it would have shown since. Pure; no torch.

The referee's word on the step after a snapshot (then it is `witnessed`) shows that the chip computes well now, not that it did: a
fault that strikes one product in a thousand is not seen by looking once. So a witnessed snapshot waits until either

    every product since the last certified snapshot was checked itself, or
    so many products were checked after it that a fault striking one product in N would have been among them with 95 %

and a certificate says which. The first holds when every step is checked, the second is what sampling can promise: of a fault that
began before the snapshot and goes on, never of one that came and went between two checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from bascule.records import AnyRecord, Migration, ProductsChecked, SnapshotEvent

CONFIDENCE = 0.95

AT_ONCE = 4
"""About so many snapshots wait at a time. A witness costs half a step, and each candidate room on the disk; more of them would move
the certified step by less than the evidence itself takes."""


def products_needed(rate: float) -> int:
    """How many right products rule out, with 95 %, that one in 1/`rate` is wrong."""
    return 1 if rate >= 1.0 else math.ceil(math.log1p(-CONFIDENCE) / math.log1p(-rate))


def ruled_out(products: int) -> float:
    """The smallest rate of wrong products that so many right ones rule out with 95 %; 1 when there are none."""
    return 1.0 if products == 0 else -math.expm1(math.log1p(-CONFIDENCE) / products)


@dataclass(frozen=True)
class Candidate:
    """A witnessed snapshot. `products` and `steps` were checked after it, `unchecked` committed steps were not.
    `whole_past`: none of the steps before it was left out since the last certified snapshot."""

    step: int
    path: Path
    products: int = 0
    steps: int = 0
    unchecked: int = 0
    whole_past: bool = False

    @property
    def says(self) -> str:
        if self.whole_past:
            return "every product since the last certified snapshot was checked"
        return (
            f"{self.products} products in {self.steps} steps checked since: rules out with 95 % a lasting fault that strikes one "
            f"product in {1 / ruled_out(self.products):.0f}"
        )


@dataclass(frozen=True)
class Candidates:
    """Witnessed snapshots that wait, oldest first. `unchecked`: committed steps since the last certified snapshot that ran
    unchecked; one more stands for a past that nobody here has seen."""

    needed: int
    waiting: tuple[Candidate, ...] = ()
    unchecked: int = 0

    def witnessed(self, step: int, path: Path) -> Candidates:
        """The referee agrees with the step after `path`; nothing was checked since."""
        kept = tuple(one for one in self.waiting if one.step < step)
        new = Candidate(step, path, whole_past=self.unchecked == 0)
        return replace(self, waiting=(*kept, new))

    @property
    def wants_another(self) -> bool:
        """Is the next snapshot worth a witness? Always where it can be certified at once."""
        return (
            not self.waiting
            or self.unchecked == 0
            or self.waiting[-1].products * AT_ONCE >= self.needed
        )

    def checked(self, products: int, steps: int = 1) -> Candidates:
        """So many products were looked at now, and all were right."""
        return self._each(
            lambda one: replace(one, products=one.products + products, steps=one.steps + steps)
        )

    def skipped(self) -> Candidates:
        """A step was committed whose products nobody looked at."""
        more = self._each(lambda one: replace(one, unchecked=one.unchecked + 1))
        return replace(more, unchecked=self.unchecked + 1)

    def due(self) -> Candidate | None:
        """The oldest candidate, if it may be certified now."""
        first = self.waiting[0] if self.waiting else None
        ready = first is not None and (first.whole_past or first.products >= self.needed)
        return first if ready else None

    def certified(self, one: Candidate) -> Candidates:
        """`one` is certified: what lies before it is settled, and the next candidate's past begins there."""
        left = tuple(
            replace(other, whole_past=other.unchecked == one.unchecked)
            for other in self.waiting
            if other.step > one.step
        )
        return replace(self, waiting=left, unchecked=one.unchecked)

    def _each(self, change: Callable[[Candidate], Candidate]) -> Candidates:
        return replace(self, waiting=tuple(change(one) for one in self.waiting))


def recalled(records: Iterable[AnyRecord], pool: str, snapshots: Path, needed: int) -> Candidates:
    """What earlier launches on `pool` left waiting, with what was checked since. Which steps went unchecked is not in the ledger:
    every snapshot's past counts as such. A rollback voids what it goes behind, and another chip's checks say nothing of this one."""
    found = Candidates(needed)
    for record in records:
        if isinstance(record, Migration):
            kept = tuple(one for one in found.waiting if one.step <= record.resumed_from_step)
            found = Candidates(needed, kept, unchecked=len(kept))
        elif isinstance(record, SnapshotEvent | ProductsChecked) and record.pool != pool:
            found = found if record.pool is None else Candidates(needed)
        elif isinstance(record, ProductsChecked):
            found = found.checked(record.products, record.steps)
        elif isinstance(record, SnapshotEvent) and record.state == "witnessed":
            path = snapshots / Path(record.path).name
            found = found.skipped().witnessed(record.step, path)
        elif isinstance(record, SnapshotEvent) and record.state == "certified":
            left = tuple(one for one in found.waiting if one.step > record.step)
            found = Candidates(needed, left, unchecked=len(left))
    return found
