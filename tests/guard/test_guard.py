"""The judge on a real training run: silent when clean, bit-neutral, and right about whose fault it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from bascule import errors
from bascule.config.trust import GuardConfig
from bascule.ledger import of_kind
from bascule.records import Incident, Judgement, PoolReadmitted
from bascule.train import checkpoint
from bascule.train.optimizer import SplitOptimizer
from bascule.train.step import NoJudge

EVERYTHING = GuardConfig(checksum_every_steps=1, audit_every_steps=1)


def test_a_clean_run_raises_no_alarm_and_every_snapshot_is_certified(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = guarded.rig(tmp_path, config=EVERYTHING)
    rig.run(12, every=4)
    assert rig.alarms == [] and rig.incidents == []
    assert rig.certified == [0, 4, 8]
    assert checkpoint.trust(checkpoint.path_of(rig.folder.snapshots, 4)).witness is not None
    # Every audit is recorded; when the head's turn comes there is nothing to capture.
    assert len(of_kind(rig.ledger.read(), Judgement)) >= 9


def test_the_guard_changes_no_bit_of_training(tmp_path: Path, guarded: ModuleType) -> None:
    watched = guarded.rig(tmp_path / "a", config=EVERYTHING)
    watched.run(6)
    plain = guarded.rig(tmp_path / "b")
    plain.stepper.judge = NoJudge()
    plain.stepper.begin(plain.objective)
    for step in range(1, 7):
        plain.stepper.commit(plain.stepper.propose(plain.objective.next_batch(step)))
    for name, tensor in plain.stepper.model_state().items():
        assert torch.equal(tensor, watched.stepper.model_state()[name]), name


def test_high_learning_rate_is_optimisation_and_never_the_chip(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = guarded.rig(tmp_path, learning_rate=2.0, muon=3.0)
    try:
        rig.run(40, every=10)
    except errors.GuardStopped as stopped:
        assert "Lower the learning rate" in str(stopped)
    assert not any("chip" in incident.attribution for incident in rig.incidents)


def _poisoned(guarded: ModuleType, root: Path, spoil):  # type: ignore[no-untyped-def]
    """A run to step 24, then step 25 with a batch that `spoil` has changed; returns (rig, verdict)."""
    rig = guarded.rig(root, config=GuardConfig(checksum_every_steps=50, audit_every_steps=50))
    rig.run(24, every=12)
    batch = rig.objective.next_batch(25)
    batch = dataclasses.replace(
        batch, tensors=spoil({name: tensor.clone() for name, tensor in batch.tensors.items()})
    )
    proposal = rig.stepper.propose(batch)
    return rig, rig.guard.judge(proposal, rig.stepper)


def _division_by_zero(tensors):  # type: ignore[no-untyped-def]
    mask = tensors["mask"]
    mask[0, 1] -= (
        mask.sum()
    )  # the weights of the tokens add up to 0, and the loss is a mean over them
    return tensors


def _almost(tensors):  # type: ignore[no-untyped-def]
    mask = tensors["mask"]
    mask[0, 1] -= mask.sum() - 0.01
    return tensors


def test_a_batch_that_is_not_a_number_is_data_and_is_left_out(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig, committed = _poisoned(guarded, tmp_path, _division_by_zero)
    assert not committed
    assert [(i.attribution, i.sentinel, i.action) for i in rig.incidents] == [
        ("data", "finite", "the batch is left out")
    ]


def test_a_batch_that_blows_the_loss_up_is_data(tmp_path: Path, guarded: ModuleType) -> None:
    rig, committed = _poisoned(guarded, tmp_path, _almost)
    assert not committed
    assert {i.attribution for i in rig.incidents} == {"data"}
    assert "earlier batches are normal" in rig.incidents[0].evidence


def test_a_refused_batch_is_refused_again_without_another_investigation(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig, _ = _poisoned(guarded, tmp_path, _division_by_zero)
    proposal = rig.stepper.propose(rig.objective.next_batch(25), attempt=1)
    assert rig.guard.judge(proposal, rig.stepper) is False
    assert len(rig.incidents) == 1


def test_repeated_one_offs_condemn_the_chip_after_its_strikes(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = guarded.rig(
        tmp_path,
        "sim:zeroed?transient=true&rate=0.3@cpu",
        config=GuardConfig(checksum_every_steps=1, transient_strikes=3),
    )
    with pytest.raises(errors.ChipCondemned, match="strike 3 of 3"):
        rig.run(12)
    assert [incident.attribution for incident in rig.incidents] == ["transient chip fault"] * 3


def test_readmission_forgets_the_strikes(tmp_path: Path, guarded: ModuleType) -> None:
    rig = guarded.rig(tmp_path)
    strike = Incident(
        pool="chip",
        incident_id="0001-step-3",
        step=3,
        sentinel="checksum",
        attribution="transient chip fault",
        action="",
        evidence="",
    )
    rig.ledger.append(strike)
    assert rig.guard.book.strike_steps() == [3]
    rig.ledger.append(PoolReadmitted(pool="chip", role="train", reason="board replaced"))
    assert rig.guard.book.strike_steps() == []


def test_a_wrong_update_is_seen_by_the_next_step_and_rolls_back(
    tmp_path: Path, guarded: ModuleType
) -> None:
    """Gradients are right, the update is not: weights are doubled where Muon wrote."""
    rig = guarded.rig(tmp_path, config=GuardConfig(checksum_every_steps=50, audit_every_steps=3))
    rig.run(2, every=5)
    original = rig.stepper.optimizer.step

    def wrong(grads, *, factor, grad_scale):  # type: ignore[no-untyped-def]
        original(grads, factor=factor * 1.01, grad_scale=grad_scale)

    first = rig.stepper.propose(rig.objective.next_batch(3))
    assert rig.guard.judge(first, rig.stepper)
    rig.stepper.optimizer.step = wrong
    rig.stepper.commit(first)
    with pytest.raises(errors.RollbackNeeded, match="the update of step 3 changed"):
        rig.guard.judge(rig.stepper.propose(rig.objective.next_batch(4)), rig.stepper)
    assert rig.alarms[-1].sentinel == "update audit"


@pytest.mark.parametrize("amount", [1.0, 1.5])
def test_updates_of_the_fused_kernel_pass_and_a_wrong_one_is_seen(
    tmp_path: Path, guarded: ModuleType, amount: float
) -> None:
    """The chip updates through the fused kernel, the referee by the formula; from step 4 to 4 the chip's kernel goes too far."""
    profile = f'sim:gain-0.2-percent?ops=["addcdiv_"]&amount={amount}&onset_step=4&until_step=4@cpu'
    config = GuardConfig(checksum_every_steps=50, audit_every_steps=2)
    rig = guarded.rig(tmp_path, profile, config=config, muon=0.0)

    def new_optimizer(model: nn.Module) -> SplitOptimizer:
        on_chip = model is rig.stepper.model
        named = dict(model.named_parameters())
        return SplitOptimizer(named, learning_rate=3e-3, fused=on_chip)

    rig.objective.new_optimizer = new_optimizer
    if amount == 1.0:
        rig.run(8)
        assert rig.alarms == [] and rig.steps == list(range(1, 9))
        return
    with pytest.raises(errors.RollbackNeeded):
        rig.run(8)
    assert rig.alarms[0].sentinel in ("update size", "update audit")
    assert guarded.truth(tmp_path) == [4]


def test_a_flipped_bit_in_a_weight_is_seen_before_the_step_commits(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = guarded.rig(tmp_path, config=GuardConfig(checksum_every_steps=50, audit_every_steps=50))
    rig.run(2, every=5)
    weight = next(iter(rig.stepper.model.parameters())).detach()
    weight.view(-1)[7:8].view(torch.int32).bitwise_xor_(
        1
    )  # the lowest bit: no number of the step would show it
    with pytest.raises(errors.RollbackNeeded, match="changed while nobody wrote to it"):
        rig.guard.judge(rig.stepper.propose(rig.objective.next_batch(3)), rig.stepper)


def test_a_flipped_bit_in_a_moment_or_a_router_bias_is_seen_before_the_step_commits(
    tmp_path: Path, guarded: ModuleType
) -> None:
    """The referee's update would start from the same rotten moment and agree. Looked at after every eighth commit, and after those
    that ran under checksums."""
    rarely = GuardConfig(checksum_every_steps=50, audit_every_steps=50)
    often = GuardConfig(checksum_every_steps=1, audit_every_steps=50)
    for number, (steps, config) in enumerate(((8, rarely), (2, often))):
        clean = guarded.rig(tmp_path / f"clean-{number}", config=config)
        clean.run(steps + 1, every=20)
        assert not clean.alarms
        names = list(clean.stepper.kept())
        assert {name.split("/")[0] for name in names} >= {"momentum", "first", "second"}
        for name in (names[0], "second"):
            rig = guarded.rig(tmp_path / f"{number}-{name}", config=config)
            rig.run(steps, every=20)
            hit = next(tensor for at, tensor in rig.stepper.kept().items() if at.startswith(name))
            hit.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
            with pytest.raises(errors.RollbackNeeded, match=f"the bits of {name}.* changed while"):
                proposal = rig.stepper.propose(rig.objective.next_batch(steps + 1))
                rig.guard.judge(proposal, rig.stepper)


def test_the_last_snapshot_is_certified_by_a_step_that_is_never_committed(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = guarded.rig(tmp_path)
    rig.run(5)
    assert rig.certified == [0]
    before = {name: tensor.clone() for name, tensor in rig.stepper.model_state().items()}
    assert rig.guard.certify_last(rig.stepper.propose, rig.objective.next_batch(6), rig.stepper)
    assert rig.certified == [0, 5]
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in rig.stepper.model_state().items()
    )


def test_a_launch_that_resumes_from_an_uncertified_snapshot_does_not_trust_its_past(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = guarded.rig(tmp_path, "sim:transient?onset_step=6&until_step=6@cpu", config=EVERYTHING)
    rig.guard.after_snapshot(5, tmp_path / "step-00000005")
    assert rig.guard.certification.candidates.unchecked == 1
    fresh = guarded.rig(tmp_path / "b")
    fresh.guard.after_snapshot(0, tmp_path / "step-00000000")
    assert fresh.guard.certification.candidates.unchecked == 0
