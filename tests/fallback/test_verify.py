"""The continuation is proven on the new chip before the run goes on, and refused when it computes something else."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.errors import ContinuationRefused, SnapshotError
from bascule.fallback import migrate, verify
from bascule.ledger import of_kind
from bascule.records import Continuation, Warned
from bascule.train import checkpoint, loop
from bascule.train.optimizer import SplitOptimizer
from bascule.train.state import TrainState
from bascule.train.step import Stepper

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


def prove(rig: Any, path: Path, **more: Any) -> Continuation | None:
    return verify.prove(path, rig.stepper, REFEREE, rig.ledger, {"sft": rig.objective}, **more)


def standing(stepper: Stepper) -> dict[str, Any]:
    assert stepper.optimizer is not None
    state = {**stepper.model_state(), **stepper.optimizer.state_dict(), "step": stepper.step}
    return {n: one.clone() if isinstance(one, torch.Tensor) else one for n, one in state.items()}


def test_a_good_chip_continues_and_the_proof_is_recorded(left: Path, guarded: ModuleType) -> None:
    rig, path = resumed(left, guarded, "cpu")
    before = standing(rig.stepper)
    found = prove(rig, path)
    assert found is not None and found.verified and found.max_error == 0.0
    assert found.steps == (6, 1), "and the recorded step of the certified snapshot before it"
    assert "its update too" in found.detail
    assert of_kind(rig.ledger.read(), Continuation)[-1].verified
    torch.testing.assert_close(standing(rig.stepper), before, rtol=0, atol=0)


@pytest.mark.parametrize("damaged", ["witness.safetensors", "trust.json"])
def test_the_replays_beat_and_an_earlier_damaged_witness_is_said_and_passed_over(
    left: Path, guarded: ModuleType, damaged: str
) -> None:
    rig, path = resumed(left, guarded, "cpu")
    (left / "snapshots" / "step-00000000" / damaged).write_bytes(b"x")
    beats: list[int] = []
    found = prove(rig, path, on_replay=lambda: beats.append(1))
    assert found is not None and found.verified and found.steps == (6,) and beats
    warned = of_kind(rig.ledger.read(), Warned)
    assert [one.what for one in warned] == ["recorded step not replayed"]


def test_a_chip_whose_gradients_are_right_and_whose_update_is_not_is_refused(
    left: Path, guarded: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, path = resumed(left, guarded, "cpu")
    whole, mine = SplitOptimizer.step, next(rig.stepper.model.parameters())

    def step(self: SplitOptimizer, *args: Any, **kwargs: Any) -> None:
        whole(self, *args, **kwargs)
        if mine is next(iter(self.parameters.values())):  # the referee's copy is another
            mine.mul_(1.001)

    monkeypatch.setattr(SplitOptimizer, "step", step)
    with pytest.raises(ContinuationRefused, match="equal bit for bit; but the update of step 6"):
        prove(rig, path)


def test_a_witness_of_the_next_phase_is_replayed_in_that_phase(
    tmp_path: Path, guarded: ModuleType
) -> None:
    """A snapshot at a phase's end is witnessed by the first step of the next one; that once ended the trainer with an error of ours."""
    first = guarded.rig(tmp_path)
    objectives = {"sft": first.objective, "more": copy.copy(first.objective)}
    objectives["more"].phase = "more"
    plan = loop.Plan({"sft": 4, "more": 4}, first.folder.snapshots, 100)
    batch = first.objective.next_batch
    objectives["more"].next_batch = lambda step: replace(batch(step), phase="more")
    hooks = loop.Hooks(on_snapshot=first.guard.after_snapshot, on_step=first.ledger.append)
    loop.run(first.stepper, objectives, first.guard, TrainState(), plan, hooks)
    rig = guarded.rig(tmp_path)
    path = checkpoint.path_of(rig.folder.snapshots, 4)
    loop.resume(rig.stepper, objectives, path, TrainState())
    before = standing(rig.stepper)
    found = verify.prove(path, rig.stepper, REFEREE, rig.ledger, objectives)
    assert found is not None and found.verified and found.steps[0] == 5
    assert rig.stepper.objective is objectives["sft"]
    torch.testing.assert_close(standing(rig.stepper), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "chip", ["sim:backward-wrong", "sim:softmax-0.99", "sim:gain-0.2-percent", "sim:truncation"]
)
def test_a_chip_that_computes_something_else_is_refused(
    left: Path, guarded: ModuleType, chip: str
) -> None:
    rig, path = resumed(left, guarded, chip)
    with pytest.raises(ContinuationRefused, match="does not continue the run from step-00000005"):
        prove(rig, path)
    assert of_kind(rig.ledger.read(), Continuation)[-1].verified is False


def test_a_chip_that_only_rounds_differently_continues(left: Path, guarded: ModuleType) -> None:
    rig, path = resumed(left, guarded, "sim:jitter")
    found = prove(rig, path)
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
        prove(rig, path)


def test_a_snapshot_without_a_witness_says_so(left: Path, guarded: ModuleType) -> None:
    rig, _ = resumed(left, guarded, "cpu")
    path = loop.save(
        rig.stepper,
        TrainState(step=5, phase="sft"),
        loop.Plan({"sft": 7}, left / "elsewhere"),
        loop.Hooks(),
    )
    checkpoint.set_trust(path, "verified", "read back")
    assert prove(rig, path) is None
    assert rig.ledger.read()[-1].kind == "warning"
