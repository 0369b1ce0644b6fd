"""After a rollback the first step that comes out differently tells where the earlier launch was spoilt."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from bascule import errors
from bascule.config.trust import GuardConfig
from bascule.guard.hindsight import Earlier, earlier_steps, first_difference
from bascule.ledger import of_kind
from bascule.records import Judgement


def told(rig) -> list[str]:  # type: ignore[no-untyped-def]
    return [
        record.reason
        for record in of_kind(rig.ledger.read(), Judgement)
        if record.reason.startswith("hindsight")
    ]


def test_the_next_chip_names_the_step_that_the_condemned_one_spoilt(
    tmp_path: Path, guarded: ModuleType
) -> None:
    """Backward products are wrong from step 3 on; nothing looks before the certification of step 6's snapshot."""
    blind = GuardConfig(checksum_every_steps=50, audit_every_steps=50)
    with pytest.raises(errors.ChipCondemned):
        guarded.rig(tmp_path, "sim:backward-wrong?onset_step=3@cpu", config=blind).run(12, every=6)
    rig = guarded.rig(tmp_path, "cpu", config=blind)
    rig.run(8, every=6)
    assert len(told(rig)) == 1 and "step 3 has the same loss" in told(rig)[0]


def test_repeating_right_steps_says_nothing(tmp_path: Path, guarded: ModuleType) -> None:
    guarded.rig(tmp_path).run(8, every=4)
    rig = guarded.rig(tmp_path)
    rig.run(10, every=4)
    assert rig.steps.count(8) == 2 and told(rig) == []


def test_a_different_loss_points_at_the_forward_pass_or_the_update_before() -> None:
    earlier = {7: Earlier(1.5, 2.0, 1, "r2")}
    assert first_difference(earlier, 7, 1.5, 2.0) is None
    assert first_difference(earlier, 8, 9.0, 9.0) is None
    assert "update of step 6" in str(first_difference(earlier, 7, 1.25, 2.0))
    assert earlier_steps([]) == {}
