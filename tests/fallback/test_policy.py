"""The ladder: start again, move, stop; decided from the ledger alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.errors import NoPoolLeft
from bascule.fallback import policy
from bascule.fallback.policy import Setback, next_move
from bascule.place.placement import place
from bascule.records import (
    AnyRecord,
    Incident,
    Migration,
    PoolCondemned,
    PoolReadmitted,
    SnapshotEvent,
    Verdict,
)

ORDER = ("r2", "b", "cpu")


def placing(condemned):  # type: ignore[no-untyped-def]
    return place(VERDICTS, ORDER, condemned)


VERDICTS = [
    Verdict(
        pool=pool,
        role=role,
        verdict="fit",
        reasons=(),
        accelerator=pool,
        chip=pool,
        driver="1",
        simulated=False,
    )
    for pool in ORDER
    for role in ("train", "infer")
]


def went_back(pool: str, step: int = 7) -> Migration:
    return Migration(
        pool=pool,
        from_pool=pool,
        to_pool=pool,
        failed_at_step=step,
        resumed_from_step=5,
        steps_recomputed=1,
        seconds_lost=1.0,
        snapshot="step-00000005",
    )


def certified(step: int) -> SnapshotEvent:
    return SnapshotEvent(step=step, state="certified", path="", sha256="")


def verified(step: int) -> SnapshotEvent:
    return SnapshotEvent(step=step, state="verified", path="", sha256="")


def setback(ending: str, pool: str = "r2") -> Setback:
    return Setback(pool, ending, 7, f"{ending} at step 7")


def test_a_condemned_chip_is_left_at_once_for_the_next_pool_of_the_owners_order() -> None:
    move = next_move([certified(5)], setback("ChipCondemned"), placing)
    assert (move.rung, move.pool, move.condemn) == ("another pool", "b", ("r2",))


@pytest.mark.parametrize("ending", ["Hang", "Death", "RollbackNeeded"])
def test_what_may_be_bad_luck_is_tried_again_here_until_the_budget_is_spent(ending: str) -> None:
    records: list[AnyRecord] = [certified(5)]
    moves = []
    for _ in range(3):
        moves.append(next_move(records, setback(ending), placing))
        records.append(went_back("r2"))
    assert [(move.rung, move.pool) for move in moves] == [
        ("start again", "r2"),
        ("start again", "r2"),
        ("another pool", "b"),
    ]
    assert moves[0].wait_s <= moves[1].wait_s


def test_progress_refills_the_budget_and_the_same_snapshot_again_is_not_progress() -> None:
    stuck = [certified(5), went_back("r2"), certified(5), went_back("r2")]
    assert next_move(stuck, setback("Death"), placing).rung == "another pool"
    assert next_move([*stuck, certified(10)], setback("Death"), placing).rung == "start again"


def test_a_snapshot_that_still_waits_for_its_certificate_is_progress_and_the_same_again_is_not() -> (
    None
):
    lagging = [
        certified(5),
        *(one for at in (50, 100, 150) for one in (went_back("r2"), verified(at))),
    ]
    assert next_move(lagging, setback("Death"), placing).rung == "start again"
    again = [
        *lagging,
        went_back("r2"),
        verified(100),
        verified(150),
        went_back("r2"),
        verified(150),
    ]
    assert next_move(again, setback("Death"), placing).rung == "another pool"


def down_the_ladder(order: tuple[str, ...], ending: str) -> list[policy.Move]:
    """Every launch ends with `ending`, nothing is certified any more: the moves until no pool is left. `a0`, `a1`, ...: chips of a."""
    records: list[AnyRecord] = [certified(5)]
    pool, moves = order[0], []
    verdicts = [one.model_copy(update={"pool": pool}) for one in VERDICTS[:2] for pool in order]
    while True:
        siblings = [one for one in order if one[0] == pool[0] and one != pool]
        try:
            move = next_move(
                records,
                setback(ending, pool),
                lambda out: place(verdicts, order, out),
                siblings=siblings,
            )
        except NoPoolLeft:
            return moves
        moves.append(move)
        records += [
            PoolCondemned(pool=one, role="train", incident_id=None, reason="")
            for one in move.condemn
        ]
        records.append(went_back(pool))
        pool = move.pool


def test_the_rungs_are_start_again_then_another_chip_then_another_pool_each_with_its_wait() -> None:
    proven = down_the_ladder(("a0", "a1", "b0"), "ChipCondemned")
    assert [(move.rung, move.pool) for move in proven] == [
        ("another chip", "a1"),
        ("another pool", "b0"),
    ]
    unlucky = down_the_ladder(("a0", "a1", "b0"), "Death")
    assert [(move.rung, move.pool, move.wait_s) for move in unlucky] == [
        ("start again", "a0", 1.0),
        ("start again", "a0", 2.0),
        ("another chip", "a1", 0.0),
        ("start again", "a1", 1.0),
        ("start again", "a1", 2.0),
        ("another pool", "b0", 1.0),
        ("start again", "b0", 1.0),
        ("start again", "b0", 2.0),
    ]


def test_the_chips_of_a_kind_that_fails_one_after_the_other_are_not_all_tried() -> None:
    moves = down_the_ladder((*(f"a{n}" for n in range(6)), "b0"), "ChipCondemned")
    assert [move.pool for move in moves] == ["a1", "a2", "b0"]
    assert moves[-1].condemn == ("a2", "a3", "a4", "a5")


def test_no_pool_left_tells_the_story_so_far() -> None:
    told = Incident(
        pool="r2",
        incident_id="0001-step-3",
        step=3,
        sentinel="checksum",
        attribution="persistent chip fault",
        action="condemned",
        evidence="",
    )
    records: list[AnyRecord] = [
        told,
        *(
            PoolCondemned(pool=pool, role="train", incident_id=None, reason="bad")
            for pool in ("r2", "b")
        ),
    ]
    with pytest.raises(NoPoolLeft, match="step 3 on 'r2': persistent chip fault"):
        next_move(records, setback("ChipCondemned", "cpu"), placing)


def test_a_readmitted_pool_is_in_again_and_only_for_that_role() -> None:
    out = [
        PoolCondemned(pool="r2", role=role, incident_id=None, reason="bad")
        for role in ("train", "infer")
    ]
    assert policy.condemned([*out, PoolReadmitted(pool="r2", role="infer", reason="fixed")]) == {
        ("r2", "train")
    }


@given(
    st.lists(
        st.sampled_from(
            [
                "Hang",
                "Death",
                "RollbackNeeded",
                "ChipCondemned",
                "OutOfMemory",
                "certified",
                "verified",
                "again",
            ]
        ),
        max_size=60,
    )
)
def test_the_ladder_always_ends(endings: list[str]) -> None:
    """Whatever happens, without progress there are at most a budget of launches per pool, then NoPoolLeft."""
    records: list[AnyRecord] = []
    pool, since_progress, step = "r2", 0, 0
    for ending in endings:
        if ending == "again":
            records.append(verified(step))
            continue
        if ending in ("certified", "verified"):
            step += 5
            since_progress = 0
            records.append(certified(step) if ending == "certified" else verified(step))
            continue
        try:
            move = next_move(records, setback(ending, pool), placing)
        except NoPoolLeft:
            return
        since_progress += 1
        assert since_progress <= policy.LAUNCHES_PER_POOL * len(ORDER)
        assert move.pool not in move.condemn
        records += [
            PoolCondemned(pool=one, role="train", incident_id=None, reason=move.reason)
            for one in move.condemn
        ]
        records.append(went_back(pool))
        pool = move.pool
