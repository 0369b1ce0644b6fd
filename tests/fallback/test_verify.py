"""The continuation is proven on the new chip before the run goes on, and refused when it computes something else."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.errors import ContinuationRefused, SnapshotError
from bascule.fallback import migrate, verify
from bascule.ledger import of_kind
from bascule.records import Continuation
from bascule.train import checkpoint, loop
from bascule.train.state import TrainState

REFEREE = CpuAccelerator("referee")


@pytest.fixture
def left(tmp_path: Path, guarded: ModuleType) -> Path:
    """A run of 8 steps; the snapshot of step 5 is witnessed by step 6, and certified after step 8, whose products are checked."""
    guarded.rig(tmp_path).run(8, every=5)
    return tmp_path


def resumed(root: Path, guarded: ModuleType, chip: str):  # type: ignore[no-untyped-def]
    rig = guarded.rig(root, chip)
    choice = migrate.choose(rig.folder.snapshots, rig.ledger)
    loop.resume(rig.stepper, {"sft": rig.objective}, choice.path, TrainState())
    return rig, choice.path


def test_a_good_chip_continues_and_the_proof_is_recorded(left: Path, guarded: ModuleType) -> None:
    rig, path = resumed(left, guarded, "cpu")
    before = {name: tensor.clone() for name, tensor in rig.stepper.model_state().items()}
    found = verify.prove(path, rig.stepper, REFEREE, rig.ledger)
    assert found is not None and found.verified and found.steps == (6,) and found.max_error == 0.0
    assert of_kind(rig.ledger.read(), Continuation)[-1].verified
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in rig.stepper.model_state().items()
    )


@pytest.mark.parametrize(
    "chip", ["sim:backward-wrong", "sim:softmax-0.99", "sim:gain-0.2-percent", "sim:truncation"]
)
def test_a_chip_that_computes_something_else_is_refused(
    left: Path, guarded: ModuleType, chip: str
) -> None:
    rig, path = resumed(left, guarded, chip)
    with pytest.raises(ContinuationRefused, match="does not continue the run from step-00000005"):
        verify.prove(path, rig.stepper, REFEREE, rig.ledger)
    assert of_kind(rig.ledger.read(), Continuation)[-1].verified is False


def test_a_chip_that_only_rounds_differently_continues(left: Path, guarded: ModuleType) -> None:
    rig, path = resumed(left, guarded, "sim:jitter")
    found = verify.prove(path, rig.stepper, REFEREE, rig.ledger)
    assert found is not None and found.verified
    assert (
        found.max_error is not None
        and found.bound is not None
        and 0.0 < found.max_error <= found.bound
    )


def test_an_altered_witness_is_refused(left: Path, guarded: ModuleType) -> None:
    rig, path = resumed(left, guarded, "cpu")
    witness = path / "witness.safetensors"
    witness.write_bytes(witness.read_bytes()[:-1] + b"x")
    with pytest.raises(SnapshotError, match="hash differs"):
        verify.prove(path, rig.stepper, REFEREE, rig.ledger)


def test_a_snapshot_without_a_witness_says_so(left: Path, guarded: ModuleType) -> None:
    rig, _ = resumed(left, guarded, "cpu")
    path = loop.save(
        rig.stepper,
        TrainState(step=5, phase="sft"),
        loop.Plan({"sft": 7}, left / "elsewhere"),
        loop.Hooks(),
    )
    checkpoint.set_trust(path, "verified", "read back")
    assert verify.prove(path, rig.stepper, REFEREE, rig.ledger) is None
    assert rig.ledger.read()[-1].kind == "warning"
