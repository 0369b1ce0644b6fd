"""The first operator that is wrong for the inputs it had is named, and none is on a chip that is right."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from bascule.accelerators.cpu import CpuAccelerator
from bascule.guard.culprit import Culprit, first_wrong_operator
from bascule.guard.noise import NoiseFloor
from bascule.guard.replay import investigate

REFEREE = CpuAccelerator("referee")


def asked(root: Path, guarded: ModuleType, profile: str) -> Culprit | None:
    rig = guarded.rig(root, f"sim:{profile}@cpu")
    rig.stepper.begin(rig.objective)
    return first_wrong_operator(rig.stepper, rig.objective.next_batch(1), 20, REFEREE)


@pytest.mark.parametrize(
    ("profile", "operators"),
    [
        ("softmax-0.99", "attention softmax bmm"),
        ("first-layer-gradient", "embedding_dense_backward"),
        ("drop-best", "topk"),
        ("gain-0.2-percent", "mm"),
        ("rsqrt-off", "rms_norm rsqrt"),
    ],
)
def test_the_operator_that_is_wrong_is_named_and_not_what_follows_from_it(
    tmp_path: Path, guarded: ModuleType, profile: str, operators: str
) -> None:
    found = asked(tmp_path, guarded, profile)
    assert found is not None and any(name in found.operator for name in operators.split()), found
    assert found.error > found.bound


@pytest.mark.parametrize("profile", ["clean", "jitter"])
def test_no_operator_of_a_right_chip_is_named(
    tmp_path: Path, guarded: ModuleType, profile: str
) -> None:
    assert asked(tmp_path, guarded, profile) is None


def test_an_investigation_names_it_where_no_checksum_did(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = guarded.rig(tmp_path, "sim:first-layer-gradient@cpu")
    rig.stepper.begin(rig.objective)
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    found = investigate(proposal, rig.stepper, NoiseFloor(REFEREE))
    assert found.attribution == "persistent chip fault" and not found.violations
    assert found.operator.startswith("embedding_dense_backward")
    assert f"first operator that differs: {found.operator}" in found.evidence
