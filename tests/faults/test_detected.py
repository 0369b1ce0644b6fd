"""The truth table: every profile of the catalogue, trained under the guard, and what must see it; clean rows stay silent.

The guard may not read what simulated chips really did; this file may, and asks of every row that the fault did act. Faults of
qualification, collectives and storage that cannot show in one trainer's process are named with the test that covers them.
What the checksums alone see within one step stands in test_seen_by_checksums.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bascule import errors
from bascule.config.trust import GuardConfig
from bascule.faults.catalogue import profiles
from tests import guarded

STEPS = 8

# profile (with knobs that bring it into 8 steps) -> sentinels of which one must cry first. All end with the chip condemned.
CONDEMNED = {
    "ascend-r2?onset_step=3": {"checksum", "audit", "certification", "update checksum"},
    "corrupt": {"finite", "checksum"},
    "zeroed": {"checksum"},
    "bit-flip": {"checksum"},
    "sign": {"checksum"},
    "nan": {"finite", "checksum"},
    "backward-wrong": {"checksum"},
    "input-range": {"checksum"},
    "ageing?onset_step=1&ramp_steps=4": {"checksum"},
    "gain-0.2-percent": {"checksum"},
    "doubled-gradient": {"checksum"},
    "truncation": {"checksum"},
    "low-precision": {"checksum"},
    "narrow-accumulation": {"checksum"},
    "softmax-0.99": {"checksum"},
    "drop-best": {"certification", "audit"},
    "bit-rot": {"memory", "checksum", "certification"},
    "intermittent": {"checksum", "finite"},
    "stuck-lane": {"checksum"},
    "cache-line": {"checksum"},
    "rsqrt-off": {"checksum"},
    'gain-0.2-percent?ops=["_log_softmax"]&amount=1.001': {"checksum"},
    "saved-activation": {"memory", "checksum", "certification"},
    "stale-copy": {"certification", "audit", "checksum"},
    "stale-replay": {"checksum"},
    "ignores-strides": {"checksum"},
    "attention-backward": {"certification", "audit", "checksum"},
    "first-layer-gradient": {"certification", "audit", "checksum"},
    "mask-slip": {"checksum", "certification", "audit"},
}
# Every row costs a core-second or two; these say little that the others do not.
SLOW = {"stuck-lane", "cache-line", "stale-replay", "ignores-strides", "attention-backward", "first-layer-gradient", "sign", "bit-flip"}  # fmt: skip

# Ends in an exception that the supervisor classifies (tests/guard/test_watchdog.py says how).
RAISED = {
    "missing-op": errors.OperatorMissing,
    "missing-backward-op": errors.OperatorMissing,
    "device-error?onset_step=3": torch.AcceleratorError,
    "oom": torch.OutOfMemoryError,
    "bad-page": torch.AcceleratorError,
}

SILENT = {
    "clean": "nothing acts",
    "infer-bad": "acts in inference only, and this is training",
    "saturating": "nothing overflows in these steps, so nothing is wrong",
    "buffer-1024": "the batch has fewer than 1024 rows, so nothing is wrong",
    "jitter": "the last bits differ by less than the step's own response to one unit in the last place",
    "host-fallback": "slow, and right",
    "compile-stall": "slow, and right",
    "over-read": "no sum in these steps is long enough, so nothing is wrong",
    "one-tile": "no product of these steps has 33 columns, so nothing is wrong",
    "softmax-past-power": "no row of these steps is that long, so nothing is wrong",
    "batched-backward": "no batched product is differentiated in these steps, so nothing is wrong",
    "exp-off": "this model's step calls exp only inside other operators, so nothing is wrong",
    "large-angles": "angles of short sequences are small, so nothing is wrong",
}

ELSEWHERE = {
    "transient": "below: it takes a second launch",
    "hang": "tests/guard/test_watchdog.py: a hang needs a process of its own",
    "dies": "tests/guard/test_watchdog.py: so does a death",
    "leak": "tests/guard/test_sentinels.py: the memory trend, on figures that real chips report and a CPU does not",
    "slow": "slow from the first step: only qualification can know that it should be faster",
    "slowing": "tests/guard/test_sentinels.py: the step time's trend",
    "fragmented": "tests/faults/test_other_families.py: runs out after more steps than these",
    **dict.fromkeys(
        (
            "wrong-all-reduce",
            "double-all-reduce",
            "lost-tail",
            "narrow-all-reduce",
            "undelivered",
            "hang-all-reduce",
            "link-flap",
            "slow-link",
        ),
        "tests/faults/test_other_families.py and links.collectives: needs several ranks",
    ),
    "torn-snapshot": "tests/fallback/test_migrate.py",
}


def test_every_profile_has_a_row() -> None:
    rows = {name.partition("?")[0] for name in (*CONDEMNED, *RAISED, *SILENT, *ELSEWHERE)}
    assert rows == set(profiles())


def run(root: Path, profile: str, *, seed: int = 0):  # type: ignore[no-untyped-def]
    rig = guarded.rig(
        root,
        f"sim:{profile}@cpu",
        seed=seed,
        config=GuardConfig(checksum_every_steps=2, audit_every_steps=3, rule_out_rate=0.02),
    )
    rig.run(STEPS, every=4)
    return rig


def records(root: Path):  # type: ignore[no-untyped-def]
    """What a run that ended in an exception left."""
    return guarded.rig(root)


@pytest.mark.parametrize(
    "profile",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CONDEMNED],
)
def test_the_fault_is_seen_by_its_sentinel_and_the_chip_is_condemned(
    tmp_path: Path, profile: str
) -> None:
    with pytest.raises(errors.ChipCondemned) as caught:
        run(tmp_path, profile)
    seen, acted = records(tmp_path), guarded.truth(tmp_path)
    assert acted, "the fault never acted, so the row proves nothing"
    assert seen.alarms[0].sentinel in CONDEMNED[profile]
    assert seen.incidents[-1].attribution == "persistent chip fault"
    assert seen.incidents[-1].incident_id == caught.value.incident_id
    assert seen.incidents[-1].step - acted[0] <= 2, "seen within one checksum interval"
    assert all(step < acted[0] for step in seen.certified), (
        "no state that the fault may have touched is certified"
    )


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(name, marks=[pytest.mark.slow] if place >= 6 else [])
        for place, name in enumerate(SILENT)
    ],
)
def test_where_nothing_is_wrong_nothing_is_said(tmp_path: Path, profile: str) -> None:
    rig = run(tmp_path, profile)
    assert (rig.alarms, rig.incidents) == ([], [])
    assert rig.steps == list(range(1, STEPS + 1)) and rig.certified == [0, 4]


@pytest.mark.parametrize("profile", RAISED)
def test_what_stops_the_step_leaves_as_its_own_exception(tmp_path: Path, profile: str) -> None:
    with pytest.raises(RAISED[profile]):
        run(tmp_path, profile)
    assert records(tmp_path).incidents == []


def test_a_one_off_is_called_transient_and_the_chip_trains_on(tmp_path: Path) -> None:
    """Step 4 is checked; steps before it were not all, so the first launch goes back to the certified snapshot. The second
    launch checks everything, meets the same moment again, discards the step, and finds it right when it is computed again."""
    profile = "transient?onset_step=4&until_step=4"
    with pytest.raises(errors.RollbackNeeded):
        run(tmp_path, profile)
    rig = run(tmp_path, profile)
    assert [incident.attribution for incident in rig.incidents] == ["transient chip fault"] * 2
    assert sorted(set(rig.steps)) == list(range(1, STEPS + 1)) and rig.certified[-1] == 4


def test_an_update_that_goes_too_far_is_seen_by_its_size_alone_and_is_left_behind(
    tmp_path: Path,
) -> None:
    """No product is wrong, and step 4 is not audited. The step after it finds the weights further than AdamW can move them."""
    profile = 'gain-0.2-percent?ops=["addcdiv_"]&amount=1.5&onset_step=4&until_step=4'
    with pytest.raises(errors.RollbackNeeded):
        run(tmp_path, profile)
    seen = records(tmp_path)
    assert [alarm.sentinel for alarm in seen.alarms] == ["update size"]
    assert "times as far as its optimizer can" in seen.alarms[0].detail
    assert 4 not in seen.certified


def test_the_weights_after_a_discarded_one_off_are_those_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    config = GuardConfig(checksum_every_steps=1, audit_every_steps=3)
    undisturbed = guarded.rig(tmp_path / "a", config=config)
    undisturbed.run(STEPS, every=4)
    disturbed = guarded.rig(
        tmp_path / "b", "sim:transient?onset_step=4&until_step=4@cpu", config=config
    )
    disturbed.run(STEPS, every=4)
    assert len(disturbed.incidents) == 1 and undisturbed.incidents == []
    for name, tensor in undisturbed.stepper.model_state().items():
        assert torch.equal(tensor, disturbed.stepper.model_state()[name]), name
