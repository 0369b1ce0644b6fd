"""What a chip scores becomes data: GRPO's old log-probabilities are watched, because no replay of the batch would question them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from bascule import errors


def _score_then_judge(rig, step: int = 1) -> bool:  # type: ignore[no-untyped-def]
    """Score a batch on the rig's chip, then let the guard judge a step that the chip computes."""
    rig.stepper.begin(rig.objective)
    batch = rig.objective.next_batch(step)
    tensors = {**batch.tensors, "real": torch.ones_like(batch.tensors["tokens"], dtype=torch.bool)}
    rig.stepper.score(tensors, step)
    return bool(rig.guard.judge(rig.stepper.propose(batch), rig.stepper))


def test_a_wrong_score_is_seen_before_the_step_that_would_learn_from_it(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = guarded.rig(tmp_path, "sim:zeroed?rate=1.0&direction=forward@cpu")
    with pytest.raises((errors.ChipCondemned, errors.RollbackNeeded)):
        _score_then_judge(rig)
    assert rig.alarms[0].sentinel == "score checksum"


def test_a_right_score_is_silent(tmp_path: Path, guarded: ModuleType) -> None:
    rig = guarded.rig(tmp_path, "cpu")
    assert _score_then_judge(rig) is True
    assert rig.alarms == []
