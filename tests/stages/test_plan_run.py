"""What a run says of its pools before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.config.load import recipe_from
from bascule.config.recipe import Recipe
from bascule.errors import CheckFailed
from bascule.ledger import Ledger, of_kind
from bascule.records import OptionPriced, Warned
from bascule.stages import plan


def asking(rows: int, **more: object) -> Recipe:
    raw = {"name": "t", "pools": {"here": {"accelerator": "cpu"}}, "train": {"phases": ["sft"]}}
    return recipe_from({**raw, "sft": {"batch_sequences": rows}, **more}, source="test")


def warnings(ledger: Ledger) -> list[Warned]:
    return of_kind(ledger.read(), Warned)


def test_a_pool_too_small_for_its_plan_is_warned_of_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: "does not fit" stood in the middle of a line, and the run went on without a word."""
    ledger = Ledger(tmp_path / "ledger.jsonl", attempt=1)
    plan.plan_run(asking(1_000_000), ledger)
    (option,) = of_kind(ledger.read(), OptionPriced)
    (warned,) = warnings(ledger)
    assert option.fits == "does not fit"
    assert warned.what == "memory forecast" and "exit code 6" in warned.detail
    assert "WARN memory forecast: pool here (cpu)" in capsys.readouterr().err
    assert plan._was_too_large("here", [option]) and not plan._was_too_large("there", [option])


def test_a_pool_that_is_large_enough_is_not_warned_of(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", attempt=1)
    plan.plan_run(asking(1), ledger)
    assert not warnings(ledger)


def test_a_strict_recipe_ends_there(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", attempt=1, strict=True)
    with pytest.raises(CheckFailed, match="memory forecast"):
        plan.plan_run(asking(1_000_000), ledger)
    assert warnings(ledger)
