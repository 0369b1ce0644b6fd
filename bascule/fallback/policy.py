"""Where to go next: the ladder from a failed launch to the next one, as a pure function of the ledger. No torch, no I/O.

    retry the step        the loop itself, inside one launch (guard and train)
    start again here      a transient fault, a death or a hang, while the budget lasts; waits longer each time
    another chip          of the same pool: a condemned chip, a refused continuation, or an exhausted budget
    another pool          no chip of the pool is left, or so many failed at the same place that what they share is suspected
    stop                  no pool is left, or the ladder went round without a newer snapshot

A pool of several chips stands in the recipe as one pool a chip (config.PoolConfig.chip_of), side by side in the owner's order: each
has its own verdicts and its own record here. Nothing is remembered outside the ledger, so a supervisor that was killed and started again decides the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bascule.errors import NoPoolLeft
from bascule.ledger import of_kind
from bascule.records import (
    AnyRecord,
    Incident,
    Migration,
    Placement,
    PoolCondemned,
    PoolReadmitted,
    Role,
    Rung,
    SnapshotEvent,
)

CONDEMNING = frozenset(
    {
        "ChipCondemned",
        "ContinuationRefused",
        "OperatorMissing",
        "AcceleratorUnavailable",
        "OutOfMemory",
    }
)
"""Endings after which the chip is not asked again: proof, or something that waiting does not change."""

PROGRESS = frozenset({"verified", "certified"})
"""States of a snapshot that say the run came further. Certificates wait for evidence, some hundred steps (guard/candidates): a
budget that only they refilled would be spent by three deaths in so many steps, however far the run came between them."""

LAUNCHES_PER_POOL = 3
"""Launches on one chip that may end badly without a newer snapshot between them."""

CHIPS_PER_POOL = 3
"""Chips of one pool that may be lost without a newer snapshot between them: after that the others are left with it."""

LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Setback:
    """A launch that ended badly. `ending`: the error's class name, or "Hang" or "Death"."""

    pool: str
    ending: str
    step: int
    reason: str
    incident_id: str | None = None


@dataclass(frozen=True)
class Move:
    """What to do. `condemn`: pools that lose the role `train` first. `wait_s`: back-off before the launch."""

    rung: Rung
    pool: str
    condemn: tuple[str, ...]
    wait_s: float
    reason: str


def condemned(records: Iterable[AnyRecord]) -> frozenset[tuple[str, Role]]:
    """(pool, role) pairs condemned and not readmitted since. A pool is readmitted by its owner, never by itself."""
    found: set[tuple[str, Role]] = set()
    for record in records:
        if isinstance(record, PoolCondemned) and record.pool:
            found.add((record.pool, record.role))
        elif isinstance(record, PoolReadmitted) and record.pool:
            found.discard((record.pool, record.role))
    return frozenset(found)


def next_move(
    records: Sequence[AnyRecord],
    setback: Setback,
    place: Callable[[frozenset[tuple[str, Role]]], Placement],
    *,
    siblings: Sequence[str] = (),
    budget: int = LAUNCHES_PER_POOL,
) -> Move:
    """Decide what follows `setback`, which is already in `records` (as an incident or a migration) or about to be.

    `place` is place.placement.place with verdicts and the owner's order filled in: condemned pools in, placement out. `siblings`:
    the other chips of the failed pool. Raises NoPoolLeft, with the story so far, when nothing can be tried.
    """
    earlier = bad_launches(records)
    here = 1 + sum(pool == setback.pool for pool in earlier)
    if setback.ending not in CONDEMNING and here < budget:
        wait = 0.0 if setback.ending == "RollbackNeeded" else _back_off(here)
        why = f"{setback.ending} {here} of {budget - 1} allowed on '{setback.pool}' since the newest snapshot"
        return Move("start again", setback.pool, (), wait, why)
    why = (
        setback.reason
        if setback.ending in CONDEMNING
        else f"{here} launches on '{setback.pool}' ended badly without a newer snapshot; last: {setback.reason}"
    )
    condemn = (setback.pool, *_left_with(setback.pool, siblings, earlier))
    lost: set[tuple[str, Role]] = {(pool, "train") for pool in condemn}
    try:
        to = place(condemned(records) | lost).train
    except NoPoolLeft as nothing:
        raise NoPoolLeft(f"{nothing} What happened: {_story(records, setback)}") from None
    wait = _back_off(len({pool for pool in earlier if pool != setback.pool}))
    return Move("another chip" if to in siblings else "another pool", to, condemn, wait, why)


def _left_with(pool: str, siblings: Sequence[str], earlier: Sequence[str]) -> tuple[str, ...]:
    """The chips that are not tried any more because too many of their kind failed at the same place."""
    lost = {pool, *(one for one in earlier if one in siblings)}
    return tuple(one for one in siblings if one not in lost) if len(lost) >= CHIPS_PER_POOL else ()


def _back_off(failures: int) -> float:
    """Seconds: none before anything failed, then 1, 2, 4 and so on. What a restart cannot mend, time sometimes does (a driver)."""
    return min(LONGEST_WAIT_S, 2.0 ** (failures - 1)) if failures else 0.0


def bad_launches(records: Sequence[AnyRecord]) -> list[str]:
    """Pools of the launches that ended badly since the run last came further, oldest first.

    A snapshot laid again after a rollback is not progress: only a step beyond every earlier one is, so the ladder cannot go round
    for ever. A pool that was readmitted starts with a clean record.
    """
    pools: list[str] = []
    furthest = -1
    for record in records:
        if (
            isinstance(record, SnapshotEvent)
            and record.state in PROGRESS
            and record.step > furthest
        ):
            furthest = record.step
            pools.clear()
        elif isinstance(record, Migration):
            pools.append(record.from_pool)
        elif isinstance(record, PoolReadmitted):
            pools = [pool for pool in pools if pool != record.pool]
    return pools


def _story(records: Sequence[AnyRecord], setback: Setback) -> str:
    told = [
        f"step {one.step} on '{one.pool}': {one.attribution} ({one.action})"
        for one in of_kind(records, Incident)
        if one.incident_id != setback.incident_id
    ]
    told.append(f"step {setback.step} on '{setback.pool}': {setback.reason.rstrip('.')}")
    return "; ".join(told[-6:]) + "."
