"""Which pools of a run are examined, and which again."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.config.load import recipe_from
from bascule.config.recipe import Recipe
from bascule.errors import NoPoolLeft
from bascule.folder import RunFolder
from bascule.ledger import Ledger, of_kind
from bascule.place.placement import place
from bascule.qualify.judge import libraries, model_sha256
from bascule.records import CUT_OFF, Placement, Verdict
from bascule.stages import qualify


def recipe(limit_s: float) -> Recipe:
    raw = {"name": "r", "pools": {"a": {"accelerator": "cpu"}}, "model": {"preset": "tick"}, "qualify": {"time_limit_s": limit_s}}  # fmt: skip
    return recipe_from(raw, source="test")


def cut_off(role: str, one: Recipe) -> Verdict:
    return Verdict(
        pool="a", role=role, verdict="unproven", reasons=(f"soak: {CUT_OFF} of 180 s",), accelerator="cpu", chip="c", driver="d",  # type: ignore[arg-type]
        simulated=False, libraries=libraries(), model_sha256=model_sha256(one.model),
    )  # fmt: skip


def test_what_a_busy_machine_cut_off_goes_on_at_the_next_launch_until_something_is_placed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: three of three runs at load 15 were cut off, and their folders refused to ever begin."""
    folder, one = RunFolder(tmp_path), recipe(0.1)
    ledger = Ledger(folder.ledger)
    before = [cut_off(role, one) for role in ("train", "infer")]
    ledger.append(*before)
    with pytest.raises(NoPoolLeft, match="Run the same command again"):
        place(before, order=("a",))
    qualify.qualify_pools(one, folder, ledger)
    assert len(of_kind(ledger.read(), Verdict)) == 4
    assert "going on where it was cut off" in capsys.readouterr().err
    ledger.append(Placement(train="a", infer="a", reasons={}), *before)
    qualify.qualify_pools(one, folder, ledger)
    assert len(of_kind(ledger.read(), Verdict)) == 6
