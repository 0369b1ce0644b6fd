"""Attribution by replay: the same step under every combination of who is wrong when."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bascule import numerics
from bascule.accelerators.cpu import CpuAccelerator
from bascule.accelerators.registry import open_accelerator
from bascule.config.trust import GuardConfig
from bascule.errors import SnapshotError
from bascule.guard import incident
from bascule.guard.noise import NoiseFloor, moved_weights
from bascule.guard.replay import again, investigate
from bascule.ledger import of_kind
from bascule.records import Warned

REFEREE = CpuAccelerator("referee")


@pytest.fixture
def trained(tmp_path: Path, guarded: ModuleType):  # type: ignore[no-untyped-def]
    def make(profile: str = "clean"):  # type: ignore[no-untyped-def]
        rig = guarded.rig(tmp_path, f"sim:{profile}@cpu")
        rig.stepper.begin(rig.objective)
        return rig

    return make


def spoilt(proposal, factor: float = 1.01):  # type: ignore[no-untyped-def]
    grads = {name: grad.clone() for name, grad in proposal.grads.items()}
    grads["model.layers.1.self_attn.o_proj.weight"] *= factor
    return dataclasses.replace(proposal, grads=grads)


def test_a_right_step_is_equal_bit_for_bit_and_nothing_is_measured(trained) -> None:  # type: ignore[no-untyped-def]
    rig = trained()
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    floor = NoiseFloor(REFEREE)
    found = floor.compare(proposal, rig.stepper.recompute(proposal.batch, REFEREE, 1), rig.stepper)
    assert found.agrees and found.detail == "equal bit for bit" and floor._cache is None


@pytest.mark.parametrize(
    ("factor", "agrees"), [(1.0 + 2e-7, True), (1.0005, False), (0.0, False), (math.nan, False)]
)
def test_the_bound_is_tight_and_not_too_tight(trained, factor: float, agrees: bool) -> None:  # type: ignore[no-untyped-def]
    rig = trained()
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    right = rig.stepper.recompute(proposal.batch, REFEREE, 1)
    found = NoiseFloor(REFEREE).compare(spoilt(proposal, factor), right, rig.stepper)
    assert found.agrees is agrees


def test_moving_weights_puts_every_bit_back(trained) -> None:  # type: ignore[no-untyped-def]
    rig = trained()
    before = [p.detach().clone() for p in rig.stepper.model.parameters()]
    with pytest.raises(RuntimeError, match="crash"), moved_weights(rig.stepper.model, 3, 2):
        assert any(
            not torch.equal(a, b)
            for a, b in zip(before, rig.stepper.model.parameters(), strict=True)
        )
        raise RuntimeError("crash")
    assert all(
        torch.equal(a, b) for a, b in zip(before, rig.stepper.model.parameters(), strict=True)
    )


def test_wrong_once_is_transient_and_the_clean_step_is_handed_back(trained) -> None:  # type: ignore[no-untyped-def]
    rig = trained()
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    found = investigate(spoilt(proposal), rig.stepper, NoiseFloor(REFEREE))
    assert found.attribution == "transient chip fault"
    assert "o_proj" in found.evidence
    assert torch.equal(
        found.clean.grads["model.layers.1.self_attn.o_proj.weight"],
        proposal.grads["model.layers.1.self_attn.o_proj.weight"],
    )


def test_wrong_again_is_persistent_and_the_first_wrong_operator_is_named_and_kept(trained) -> None:  # type: ignore[no-untyped-def]
    rig = trained("zeroed?rate=0.05")
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    found = investigate(proposal, rig.stepper, NoiseFloor(REFEREE))
    assert found.attribution == "persistent chip fault" and found.clean is None
    assert found.product is not None and str(found.product.violation) == str(found.violations[0])
    assert [replay.agrees for replay in found.replays] == [False, False, False]


def test_a_kernel_that_both_chips_of_a_kind_share_is_called_software(trained) -> None:  # type: ignore[no-untyped-def]
    rig = trained("drop-best")
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    assert (
        investigate(proposal, rig.stepper, NoiseFloor(REFEREE), same_kind=True).attribution
        == "software"
    )


def test_what_every_chip_computes_alike_is_data_or_optimisation(trained) -> None:  # type: ignore[no-untyped-def]
    rig = trained()
    proposal = rig.stepper.propose(rig.objective.next_batch(3))
    others = [rig.objective.next_batch(1), rig.objective.next_batch(2)]
    for normal, expected in ((True, "data"), (False, "optimisation")):
        found = investigate(
            proposal,
            rig.stepper,
            NoiseFloor(REFEREE),
            other_batches=others,
            looks_normal=lambda one, normal=normal: one.step != 3 and normal,
        )
        assert found.attribution == expected
    unheard = investigate(
        proposal, rig.stepper, NoiseFloor(REFEREE), looks_normal=lambda one: one.step != 3
    )
    assert unheard.attribution == "unknown" and "no earlier batch" in unheard.evidence
    assert investigate(proposal, rig.stepper, NoiseFloor(REFEREE)).attribution == "unknown"


def test_a_bound_that_the_referee_breaks_too_accuses_no_chip(
    trained,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = trained()
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    bound = numerics.checksum_bound
    monkeypatch.setattr(numerics, "checksum_bound", lambda *given: bound(*given) * 1e-9)
    violations = again(rig.stepper, proposal.batch, 1).violations
    assert violations
    found = investigate(proposal, rig.stepper, NoiseFloor(REFEREE), violations=violations)
    assert found.attribution == "unknown" and found.clean is proposal
    assert "breaks a bound there too" in found.replays[0].detail


def test_replays_run_under_checksums_inside_the_chips_session(trained) -> None:  # type: ignore[no-untyped-def]
    rig = trained("sign?rate=0.05")
    batch = rig.objective.next_batch(1)
    assert again(rig.stepper, batch, 8).violations
    assert again(rig.stepper, batch, 8, REFEREE).violations == []


def test_an_incident_replays_from_its_folder_alone(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rig = trained("zeroed?rate=0.05")
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    found = investigate(proposal, rig.stepper, NoiseFloor(REFEREE))
    folder = incident.write(
        tmp_path / "incidents" / incident.new_id(tmp_path / "incidents", 1),
        {"step": 1, "phase": "sft"},
        model=rig.stepper.model.state_dict(),
        batch=proposal.batch.tensors,
        gradients=found.gradients,
        product=found.product,
    )
    assert folder.name == "0001-step-1" and incident.new_id(folder.parent, 9) == "0002-step-9"

    def recompute(case: incident.Case, chip):  # type: ignore[no-untyped-def]
        assert all(
            torch.equal(value, case.model[name])
            for name, value in rig.stepper.model.state_dict().items()
        )
        return rig.stepper.recompute(
            dataclasses.replace(proposal.batch, tensors=case.batch), chip
        ).grads

    report = incident.replay_incident(folder, REFEREE, recompute)
    assert report.errors["referee"] == (0.0, "")
    assert report.errors["first"][0] > 1e-3 and report.errors["here"][0] > 1e-3
    assert report.product_ratio is not None and report.product_ratio <= 1.0
    assert report.product_error is not None and report.product_error < 1e-6


def test_a_folder_that_is_no_incident_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="is not an incident"):
        incident.read(tmp_path)


@pytest.mark.parametrize(
    ("other", "attribution", "words"),
    [
        ("sim:clean@cpu", "persistent chip fault", "right on sim:clean@cpu, another chip"),
        ("sim:zeroed?rate=1@cpu", "software", "wrong on sim:zeroed?rate=1@cpu too"),
    ],
)
def test_another_chip_of_the_kind_tells_the_chip_from_the_kind(
    trained, other: str, attribution: str, words: str
) -> None:  # type: ignore[no-untyped-def]
    rig = trained("zeroed?rate=1")
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    found = investigate(
        proposal, rig.stepper, NoiseFloor(REFEREE), sibling=lambda: open_accelerator(other)
    )
    assert found.attribution == attribution and words in found.evidence
    assert found.replays[-1].where.startswith("another chip of the kind")


def test_another_chip_is_not_asked_about_what_did_not_repeat_and_its_own_failure_says_nothing(
    trained,
) -> None:  # type: ignore[no-untyped-def]
    rig = trained()
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    asked = []
    found = investigate(
        spoilt(proposal), rig.stepper, NoiseFloor(REFEREE), sibling=lambda: asked.append(1)
    )
    assert found.attribution == "transient chip fault" and not asked
    bad = trained("zeroed?rate=1")
    proposal = bad.stepper.propose(bad.objective.next_batch(1))
    crashing = lambda: open_accelerator("sim:device-error?onset_step=1@cpu")  # noqa: E731
    found = investigate(proposal, bad.stepper, NoiseFloor(REFEREE), sibling=crashing)
    assert found.attribution == "persistent chip fault" and "it failed" in found.replays[-1].detail


def test_the_oldest_incidents_lose_their_weights_to_the_budget_and_say_so(
    tmp_path: Path, guarded: ModuleType
) -> None:
    """Three transient faults on a run that may keep next to nothing: the newest stays whole, the others keep story, batch and product."""
    rig = guarded.rig(
        tmp_path,
        config=GuardConfig(checksum_every_steps=1, transient_strikes=9, incidents_gib=1e-6),
    )
    rig.stepper.begin(rig.objective)
    for step in (1, 2, 3):
        proposal = spoilt(rig.stepper.propose(rig.objective.next_batch(step)))
        finding = investigate(proposal, rig.stepper, NoiseFloor(REFEREE))
        cry = rig.guard.book.suspect(step, "audit", 9.0, "planted")
        rig.guard.book.incident(proposal, rig.stepper.model, cry, finding, "tried again")
    folders = sorted(rig.folder.incidents.iterdir())
    assert [(one / "model.safetensors").exists() for one in folders] == [False, False, True]
    assert all((one / "batch.safetensors").exists() for one in folders)
    assert incident.read(folders[2]).step == 3
    with pytest.raises(SnapshotError, match="guard.incidents_gib left room for newer"):
        incident.read(folders[0])
    told = [one.detail for one in of_kind(rig.ledger.read(), Warned)]
    assert len(told) == 2 and "0001-step-1" in told[0] and "0002-step-2" in told[1]
    assert incident.make_room(rig.folder.incidents, 1.0) == []
