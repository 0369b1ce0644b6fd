"""Budget to intervals, intervals to probabilities; and the guard keeps to a measured budget."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bascule.config.trust import GuardConfig
from bascule.guard import budget
from bascule.guard.budget import (
    Intervals,
    Measured,
    coverage,
    intervals,
    steps_to_see,
    unseen,
)
from bascule.ledger import of_kind
from bascule.records import Coverage
from bascule.train.optimizer import SplitOptimizer


@pytest.mark.parametrize("percent", [0.1, 1.0, 5.0, 100.0])
def test_the_intervals_cost_no_more_than_the_budget_and_no_shorter_ones_would(
    percent: float,
) -> None:
    seen = Measured(plain_s=(1.0,) * 5, checked_s=(1.4,), audit_s=(0.7,))
    every = intervals(percent, seen)
    assert 0.4 / every.checksum + 0.7 / every.audit <= percent / 100 + 1e-9
    if every.checksum > 1:
        assert 0.4 / (every.checksum - 1) >= 0.4 * percent / 100 - 1e-9
    if every.audit > 1:
        assert 0.7 / (every.audit - 1) >= 0.2 * percent / 100 - 1e-9


def test_what_is_always_on_and_witnesses_come_out_of_the_same_budget() -> None:
    def cost(always_s: float, witnesses_s: float) -> tuple[float, float]:
        seen = Measured(plain_s=(1.0,) * 5, checked_s=(1.4,) * 3, audit_s=(0.7,) * 2, always_s=(always_s,) * 5, witnesses_s=witnesses_s, steps=1000)  # fmt: skip
        every = intervals(1.0, seen)
        looking = 0.4 / every.checksum + 0.7 / every.audit
        return looking, looking + always_s + witnesses_s / 1000

    looking, whole = cost(0.0035, 1.0)
    assert 0.0042 < looking <= 0.0045 and whole <= 0.009, "nine tenths of the budget in all"
    assert cost(0.0, 0.0)[0] <= 0.006, "not more, however cheap the rest is"
    looking, whole = cost(0.02, 0.5)
    assert 0.0038 < looking <= 0.004 and whole > 0.02, "not less, however dear the rest is"


def test_the_price_of_a_step_holds_its_update_and_the_guards_own_passes_are_counted(
    tmp_path: Path, guarded: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = guarded.rig(tmp_path, config=GuardConfig())
    update = SplitOptimizer.step

    def slow(*given: Any, **named: Any) -> None:
        time.sleep(0.2)
        update(*given, **named)

    monkeypatch.setattr(SplitOptimizer, "step", slow)
    rig.run(4, every=2)
    told = rig.guard.schedule._measured
    assert min(told.plain_s) >= 0.2
    assert len(told.always_s) == told.steps == 4 and min(told.always_s) > 0
    assert median(told.always_s) < 0.2, "waiting for the update is not the guard's"
    assert told.witnesses_s > 0, "of the snapshot after step 2"


def test_detection_within_the_stated_steps_holds_in_simulation() -> None:
    rng = np.random.default_rng(0)
    for chance in (0.5, 0.1, 0.01):
        within = steps_to_see(chance)
        seen = (rng.random((4000, within)) < chance).any(axis=1).mean()
        assert 0.94 < seen <= 1.0
        assert 1 - (1 - chance) ** (within - 1) < 0.95
    assert steps_to_see(1.0) == 1


def test_the_words_say_the_numbers() -> None:
    text = coverage(Intervals(checksum=20, audit=50), parts=6, rule_out_rate=0.001)
    assert "always wrong is seen within 20 steps" in text
    assert f"within {steps_to_see(0.005)} steps with 95 %" in text
    assert "a single wrong product with 5%" in text and "within 300 steps" in text
    assert "once 2995 products checked after it" in text and "one in 1000" in text


def test_the_guard_measures_and_then_keeps_to_its_budget(
    tmp_path: Path, guarded: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "FIRST", Intervals(4, 6))
    rig = guarded.rig(tmp_path, config=GuardConfig(budget_percent=5.0))
    rig.run(17, every=50)
    told = of_kind(rig.ledger.read(), Coverage)
    assert [one.checksum_every for one in told] == [4, rig.guard.every.checksum]
    assert rig.guard.every.audit > 6 and rig.guard.every.checksum >= 1
    assert rig.alarms == []


def test_a_budget_is_the_default_and_an_interval_that_is_set_holds(
    tmp_path: Path, guarded: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert GuardConfig().budget_percent == 1.0
    monkeypatch.setattr(budget, "FIRST", Intervals(4, 6))
    rig = guarded.rig(tmp_path / "one", config=GuardConfig(checksum_every_steps=3))
    rig.run(17, every=50)
    assert rig.guard.every.checksum == 3 and rig.guard.every.audit > 6
    both = guarded.rig(tmp_path / "both", config=GuardConfig(checksum_every_steps=3, audit_every_steps=5))  # fmt: skip
    both.run(6, every=50)
    assert both.guard.every == Intervals(3, 5)


def test_full_checks_and_audits_every_step(tmp_path: Path, guarded: ModuleType) -> None:
    rig = guarded.rig(tmp_path, config=GuardConfig(budget_percent="full"))
    assert rig.guard.every == Intervals(1, 1)


def test_what_the_intervals_buy_is_recorded_at_the_first_step(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = guarded.rig(tmp_path, config=GuardConfig(checksum_every_steps=8, audit_every_steps=5))
    rig.run(2, every=50)
    (told,) = of_kind(rig.ledger.read(), Coverage)
    assert (told.step, told.checksum_every, told.one_off_unseen) == (1, 8, 0.875)
    assert told.persistent_steps == 5 * told.parts


def test_the_chance_that_wrong_steps_go_unseen_holds_in_simulation() -> None:
    rng = np.random.default_rng(1)
    for wrong in (1, 8, 40):
        steps = rng.integers(0, 64 * 50, size=(20000, wrong))
        missed = (steps % 64 != 0).all(axis=1).mean()
        assert abs(missed - unseen(Intervals(64, 200), wrong)) < 0.015
    assert unseen(Intervals(1, 1), 1) == 0.0
