"""A drill rehearses in a copy of the owner's run: the copy goes on from its snapshots under the planted recipe, the owner's is only read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bascule.fallback import rehearsal
from bascule.folder import RunFolder, sha256_of
from bascule.ledger import of_kind
from bascule.records import StepStats
from tests import in_process


class Lost(BaseException):
    pass


def stop_before(step: int) -> Any:
    def wrap(objective: Any) -> Any:
        whole = objective.next_batch

        def next_batch(at: int) -> Any:
            if at == step:
                raise Lost
            return whole(at)

        objective.next_batch = next_batch
        return objective

    return wrap


def recipe(chip: str) -> Any:
    return in_process.recipe(
        chip, sft={"steps": 8, "batch_sequences": 4}, data={"train_problems": 64}, train={"snapshot_every_steps": 3},
    )  # fmt: skip


def test_the_copy_goes_on_from_the_owners_snapshots_and_a_copy_cut_off_is_made_again(
    tmp_path: Path,
) -> None:
    run, weights_of = in_process.run, in_process.weights_of
    with pytest.raises(Lost):
        run(recipe("cpu"), tmp_path / "owner", stop_before(8))
    owner = RunFolder(tmp_path / "owner")
    before = {path: sha256_of(path) for path in owner.root.rglob("*") if path.is_file()}
    planted = recipe("sim:zeroed?onset_step=8@cpu")
    to = RunFolder(tmp_path / "drill").create()
    (to.snapshots / "step-00000003").mkdir()  # of a copy that was cut off: there is no ledger yet
    assert rehearsal.copy_run(owner, to, planted) is None
    assert before == {path: sha256_of(path) for path in owner.root.rglob("*") if path.is_file()}
    earlier = len(of_kind(in_process.Ledger(to.ledger).read(), StepStats))
    code, records = run(planted, to.root)
    assert code == 0
    assert of_kind(records, StepStats)[earlier].step > 3, "it went on and did not begin anew"
    _, undisturbed = run(recipe("cpu"), tmp_path / "whole")
    assert weights_of(records) == weights_of(undisturbed)
