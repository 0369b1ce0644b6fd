"""Older weights tell since when a batch is abnormal, in as few passes as a bisection takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.trust import GuardConfig
from bascule.errors import SnapshotError
from bascule.guard.backwards import Older, since_when
from bascule.guard.noise import NoiseFloor
from bascule.guard.replay import investigate
from bascule.train import checkpoint

REFEREE = CpuAccelerator("referee")
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, guarded: ModuleType):  # type: ignore[no-untyped-def]
    """24 good steps with a snapshot after every third; the one after step 6 is certified, none later."""
    rarely = GuardConfig(checksum_every_steps=500, audit_every_steps=500)
    rig = guarded.rig(tmp_path_factory.mktemp("backwards"), config=rarely)
    rig.run(24, every=3)
    checkpoint.set_trust(checkpoint.path_of(rig.folder.snapshots, 6), "certified", "by the test")
    return rig


def spoilt_after(rig, step: int) -> list[Older]:  # type: ignore[no-untyped-def]
    """The run's snapshots, as if a wrong update after `step` had thrown the embedding far away."""

    def weights(one: Older) -> dict[str, torch.Tensor]:
        held = dict(one.weights())
        if one.step > step:
            held[EMBEDDING] = held[EMBEDDING] * -30.0
        return held

    return [
        Older(one.step, lambda one=one: weights(one))  # type: ignore[misc]
        for one in rig.guard.older(25, "sft")
    ]


def normal(rig):  # type: ignore[no-untyped-def]
    """Not far above what the batch costs with the weights of the sixth step."""
    batch = rig.objective.next_batch(25)
    early = next(iter(rig.guard.older(25, "sft"))).weights()
    bound = 1.2 * rig.stepper.recompute(batch, REFEREE, 8, None, early).loss
    return (batch, rig.objective.next_batch(24)), lambda proposal: proposal.loss < bound


@pytest.mark.parametrize("step", [6, 8, 11, 12, 17, 20, 23, 24])
def test_the_interval_in_which_the_weights_went_wrong_is_found(trained, step: int) -> None:  # type: ignore[no-untyped-def]
    batches, looks_normal = normal(trained)
    older = spoilt_after(trained, step)
    assert [one.step for one in older] == [6, 9, 12, 15, 18, 21, 24]
    found = since_when(*batches, trained.stepper, REFEREE, older, looks_normal)
    assert found is not None
    last_good = step // 3 * 3
    assert (found.normal, found.abnormal) == (last_good, last_good + 3 if last_good < 24 else None)
    assert len(found.replays) <= 5
    assert f"after step {last_good} this batch is normal" in found.told(25)


def test_a_batch_that_certified_weights_take_badly_is_the_batchs_own_fault(trained) -> None:  # type: ignore[no-untyped-def]
    batches, looks_normal = normal(trained)
    spoiled = lambda proposal: proposal.step != 25 and looks_normal(proposal)  # noqa: E731
    older = spoilt_after(trained, 99)
    found = since_when(*batches, trained.stepper, REFEREE, older, spoiled)
    assert found is not None and (found.normal, found.abnormal) == (None, 6)
    assert len(
        found.replays
    ) == 2 and "with the weights after step 6 it is abnormal too" in found.told(25)
    assert since_when(*batches, trained.stepper, REFEREE, [], looks_normal) is None


def test_weights_that_take_no_batch_well_are_too_old_to_say(trained) -> None:  # type: ignore[no-untyped-def]
    """The untrained model finds every batch abnormal: that is not the batch's fault."""
    batches, looks_normal = normal(trained)
    untrained = Older(
        0, checkpoint.load(checkpoint.path_of(trained.folder.snapshots, 0)).model.copy
    )
    older = [untrained, *spoilt_after(trained, 13)]
    found = since_when(*batches, trained.stepper, REFEREE, older, looks_normal)
    assert found is not None and (found.normal, found.abnormal) == (12, 15)
    assert since_when(*batches, trained.stepper, REFEREE, [untrained], looks_normal) is None


def test_a_snapshot_that_cannot_be_read_is_passed_over_and_said(trained) -> None:  # type: ignore[no-untyped-def]
    def unreadable() -> dict[str, torch.Tensor]:
        raise SnapshotError("torn")

    batches, looks_normal = normal(trained)
    older = [
        Older(one.step, unreadable) if one.step in (6, 15) else one
        for one in spoilt_after(trained, 13)
    ]
    found = since_when(*batches, trained.stepper, REFEREE, older, looks_normal)
    assert found is not None and (found.normal, found.abnormal) == (12, 18)
    assert "it cannot be read: torn" in [replay.detail for replay in found.replays]
    none = [Older(one.step, unreadable) for one in older]
    assert since_when(*batches, trained.stepper, REFEREE, none, looks_normal) is None


def test_older_weights_outweigh_other_batches(trained) -> None:  # type: ignore[no-untyped-def]
    """The weights took this batch well at the certified snapshot: then it is not the batch, whatever earlier ones look like now."""
    proposal = trained.stepper.propose(trained.objective.next_batch(25))
    others = [trained.objective.next_batch(1)]
    asked = dict(other_batches=others, older=lambda: trained.guard.older(25, "sft"))
    early = proposal.loss  # abnormal are just the present weights on this batch
    blamed = investigate(
        proposal, trained.stepper, NoiseFloor(REFEREE), **asked,
        looks_normal=lambda one: one.step != 25 or one.loss > early,
    )  # fmt: skip
    assert blamed.attribution == "optimisation"
    assert "it is the weights, not the batch" in blamed.evidence
    kept = investigate(
        proposal, trained.stepper, NoiseFloor(REFEREE), **asked, looks_normal=lambda one: one.step != 25
    )  # fmt: skip
    assert (
        kept.attribution == "data"
        and "with the weights after step 6 it is abnormal too" in kept.evidence
    )


def test_older_weights_leave_the_present_ones_alone(trained) -> None:  # type: ignore[no-untyped-def]
    (batch, control), looks_normal = normal(trained)
    before = trained.stepper.propose(batch)
    since_when(batch, control, trained.stepper, REFEREE, spoilt_after(trained, 8), looks_normal)
    after, there = trained.stepper.propose(batch), trained.stepper.recompute(batch, REFEREE, 9)
    assert before.loss == after.loss == there.loss
    weights = trained.stepper.model_state()
    with pytest.raises(ValueError, match="chip that trains"):
        trained.stepper.recompute(batch, None, 0, None, weights)
    with pytest.raises(SnapshotError, match="which this model lacks"):
        trained.stepper.recompute(batch, REFEREE, 0, None, {"other": torch.zeros(1)})


def test_only_snapshots_of_the_phase_since_the_certified_one_are_asked(trained) -> None:  # type: ignore[no-untyped-def]
    snapshots: Path = trained.folder.snapshots

    def steps(step: int, phase: str) -> list[int]:
        return [
            checkpoint.step_of(path) for path in checkpoint.since_certified(snapshots, step, phase)
        ]

    assert steps(12, "sft") == [6, 9] and steps(7, "sft") == [6]
    assert steps(12, "grpo") == []
    (snapshots / "step-copy").mkdir()
    assert steps(12, "sft") == [6, 9]


def test_samples_of_the_present_weights_are_not_asked_of_older_ones(trained) -> None:  # type: ignore[no-untyped-def]
    proposal = trained.stepper.propose(trained.objective.next_batch(25))
    asked: list[int] = []
    found = investigate(
        dataclasses.replace(proposal, phase="grpo"), trained.stepper, NoiseFloor(REFEREE),
        other_batches=[trained.objective.next_batch(1)], looks_normal=lambda one: one.step != 25, older=lambda: asked.append(1) or (),
    )  # fmt: skip
    assert found.attribution == "data" and not asked
