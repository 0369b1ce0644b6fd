"""A certificate is never given before its evidence is there: the state machine against a plain account of what happened."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule import errors
from bascule.config.trust import GuardConfig
from bascule.fallback import migrate
from bascule.guard.candidates import Candidates, products_needed, recalled, ruled_out
from bascule.ledger import of_kind
from bascule.records import Migration, ProductsChecked, SnapshotEvent
from bascule.train import checkpoint

HERE = Path("snapshots")


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.01, 0.001])
def test_so_many_right_products_rule_the_rate_out_with_95_percent_and_fewer_do_not(
    rate: float,
) -> None:
    needed = products_needed(rate)
    assert (1 - rate) ** needed <= 0.05 < (1 - rate) ** (needed - 1)
    assert ruled_out(needed) <= rate * (1 + 1e-9) < ruled_out(needed - 1)
    assert products_needed(1.0) == 1 and ruled_out(0) == 1.0


steps = st.lists(
    st.tuples(st.booleans(), st.integers(1, 40), st.booleans()), min_size=1, max_size=60
)


@given(needed=st.integers(1, 200), happened=steps)
def test_nothing_is_certified_before_its_evidence_is_there(
    needed: int, happened: list[tuple[bool, int, bool]]
) -> None:
    """Each step is checked or not, and may be followed by a snapshot. The account: which steps were checked, and how many products."""
    state, last, witnessed = Candidates(needed), 0, set()
    account: dict[int, int] = {}
    for step, (checked, products, snapshot) in enumerate(happened, start=1):
        if step - 1 in witnessed:
            state = state.witnessed(step - 1, HERE / str(step - 1))
        if checked:
            state = state.checked(products)
        while (one := state.due()) is not None:
            since = sum(account.get(after, 0) for after in range(one.step + 1, step))
            since += products if checked else 0
            whole = all(account.get(before) for before in range(last + 1, one.step + 1))
            assert whole or since >= needed, "certified too early"
            assert one.whole_past == whole
            assert one.step > last and one.step < step
            last, state = one.step, state.certified(one)
        account[step] = products if checked else 0
        if not checked:
            state = state.skipped()
        assert state.unchecked == sum(not account[after] for after in range(last + 1, step + 1))
        if snapshot:
            witnessed.add(step)
        for one in state.waiting:
            assert sum(account[after] for after in range(one.step + 1, step + 1)) < needed, (
                "kept waiting though the evidence is there"
            )


def _event(step: int, state: str, pool: str = "chip") -> SnapshotEvent:
    return SnapshotEvent(
        step=step, state=state, path=f"snapshots/step-{step:08d}", sha256="", pool=pool
    )  # type: ignore[arg-type]


def _checked(products: int, pool: str = "chip") -> ProductsChecked:
    return ProductsChecked(step=0, products=products, steps=1, pool=pool)


def test_a_new_launch_takes_up_the_evidence_of_the_one_before() -> None:
    records = [_event(4, "witnessed"), _checked(30), _event(8, "witnessed"), _checked(20)]
    found = recalled(records, "chip", HERE, 50)
    assert [(one.step, one.products) for one in found.waiting] == [(4, 50), (8, 20)]
    assert found.due() is found.waiting[0] and not found.waiting[0].whole_past
    after = found.certified(found.waiting[0])
    assert after.unchecked > 0 and not after.waiting[0].whole_past


def test_another_chips_checks_and_a_rollback_end_the_waiting() -> None:
    before = [_event(4, "witnessed"), _checked(30)]
    assert recalled([*before, _checked(1, pool="spare")], "chip", HERE, 50).waiting == ()
    back = Migration(
        from_pool="chip", to_pool="chip", failed_at_step=5, resumed_from_step=0, steps_recomputed=4, seconds_lost=0.0, snapshot="",
    )  # fmt: skip
    found = recalled([*before, back], "chip", HERE, 50)
    assert (found.waiting, found.unchecked) == ((), 0)


def test_a_snapshot_waits_for_its_evidence_and_the_last_for_its_examination(
    tmp_path: Path, guarded: ModuleType
) -> None:
    """About 100 products a checked step: 0.005 asks for 598 of them."""
    config = GuardConfig(checksum_every_steps=2, audit_every_steps=50, rule_out_rate=0.005)
    rig = guarded.rig(tmp_path, config=config)
    rig.run(16, every=4)
    witnessed = [
        e.step for e in of_kind(rig.ledger.read(), SnapshotEvent) if e.state == "witnessed"
    ]
    assert witnessed == [0, 4, 8, 12]
    assert rig.certified[0] == 0 and 12 not in rig.certified
    waiting = checkpoint.trust(checkpoint.path_of(rig.folder.snapshots, 12))
    assert waiting.state == "witnessed" and waiting.witness is not None
    assert rig.guard.certify_last(rig.stepper.propose, rig.objective.next_batch(17), rig.stepper)
    assert rig.certified == [0, 4, 8, 12, 16]
    assert "rules out with 95 % a lasting fault that strikes one product in 2" in (
        checkpoint.trust(checkpoint.path_of(rig.folder.snapshots, 16)).reason
    )


def test_a_rare_fault_that_lasts_is_met_by_the_closing_examination_at_the_latest(
    tmp_path: Path, guarded: ModuleType
) -> None:
    """One product in 500 is wrong, and no step of the run is checked: the referee's eight sequences agree, the examination does not."""
    config = GuardConfig(checksum_every_steps=50, audit_every_steps=50)
    fault = "sim:corrupt?kind=zeroed&amount=null&rate=0.002&stride=61&onset_step=3&seed={}@cpu"
    for seed in range(2):
        rig = guarded.rig(tmp_path / str(seed), fault.format(seed), config=config)
        with pytest.raises((errors.ChipCondemned, errors.RollbackNeeded)):
            rig.run(6, every=3)
            rig.guard.certify_last(rig.stepper.propose, rig.objective.next_batch(7), rig.stepper)
        struck = guarded.truth(tmp_path / str(seed))[0]
        assert all(step < struck for step in rig.certified)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_operator_that_errs_now_and_then_shows_where_equal_steps_should_be_equal(
    tmp_path: Path, guarded: ModuleType, seed: int
) -> None:
    """One top-k in twenty loses its best entry. No product is wrong, and the witness of the last snapshot meets one top-k only."""
    config = GuardConfig(checksum_every_steps=50, audit_every_steps=50)
    rig = guarded.rig(
        tmp_path, f"sim:drop-best?rate=0.05&seed={seed}&onset_step=4@cpu", config=config
    )
    with pytest.raises((errors.ChipCondemned, errors.RollbackNeeded)):
        rig.run(6, every=3)
        rig.guard.certify_last(rig.stepper.propose, rig.objective.next_batch(7), rig.stepper)
    assert all(step < guarded.truth(tmp_path)[0] for step in rig.certified)
    assert [alarm.sentinel for alarm in rig.alarms] == ["closing repeat"]
    assert rig.incidents[-1].attribution == "persistent chip fault"
    assert "topk" in rig.incidents[-1].evidence


def test_answers_that_differ_in_their_last_bits_are_not_wrong(
    tmp_path: Path, guarded: ModuleType
) -> None:
    config = GuardConfig(checksum_every_steps=50, audit_every_steps=50)
    rig = guarded.rig(tmp_path, "sim:jitter@cpu", config=config)
    rig.run(6, every=3)
    assert rig.guard.certify_last(rig.stepper.propose, rig.objective.next_batch(7), rig.stepper)
    assert rig.certified[-1] == 6 and rig.incidents == []


def test_after_a_death_a_witnessed_snapshot_is_enough_and_after_a_suspicion_it_is_not(
    tmp_path: Path, guarded: ModuleType
) -> None:
    config = GuardConfig(checksum_every_steps=50, audit_every_steps=50)
    rig = guarded.rig(tmp_path, config=config)
    rig.run(5, every=4)
    assert rig.certified == [0]
    assert migrate.choose(rig.folder.snapshots, rig.ledger, trusted="verified").step == 4
    assert migrate.choose(rig.folder.snapshots, rig.ledger).step == 0
    assert checkpoint.trust(checkpoint.path_of(rig.folder.snapshots, 4)).state == "rejected"
