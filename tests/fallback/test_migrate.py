"""Going back: the newest certified snapshot that reads back whole, and nothing later survives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bascule.errors import SnapshotError
from bascule.fallback import migrate
from bascule.ledger import Ledger, of_kind
from bascule.records import SnapshotEvent, Warned
from bascule.train import checkpoint


@pytest.fixture
def snapshots(tmp_path: Path) -> Path:
    """Steps 0, 5 and 10 certified, 15 verified, 20 saved."""
    folder = tmp_path / "snapshots"
    for step, state in (
        (0, "certified"),
        (5, "certified"),
        (10, "certified"),
        (15, "verified"),
        (20, "saved"),
    ):
        path = checkpoint.save_snapshot(
            folder,
            step,
            {"w": torch.full((4,), float(step))},
            {"m": torch.ones(3)},
            {"cursor": step},
            {},
        )
        if state != "saved":
            checkpoint.set_trust(path, state, "test")  # type: ignore[arg-type]
    return folder


def test_the_newest_certified_snapshot_is_chosen_and_later_ones_are_rejected(
    snapshots: Path, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    choice = migrate.choose(snapshots, ledger)
    assert (choice.step, choice.path.name, choice.passed_over, choice.rejected) == (
        10,
        "step-00000010",
        (),
        (15, 20),
    )
    assert checkpoint.newest(snapshots, "saved")[0] == choice.path
    assert [(event.step, event.state) for event in of_kind(ledger.read(), SnapshotEvent)] == [
        (15, "rejected"),
        (20, "rejected"),
    ]
    assert of_kind(ledger.read(), Warned) == []
    assert migrate.choose(snapshots, ledger).rejected == ()  # asking again changes nothing


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest", "trust", "witness"])
def test_a_damaged_newest_falls_back_to_the_one_before_with_a_warning(
    snapshots: Path, tmp_path: Path, damage: str
) -> None:
    newest = snapshots / "step-00000010"
    tensors = newest / "model.safetensors"
    match damage:
        case "flipped":
            data = bytearray(tensors.read_bytes())
            data[-1] ^= 1
            tensors.write_bytes(data)
        case "cut":
            tensors.write_bytes(tensors.read_bytes()[:-7])
        case "gone":
            (newest / "optimizer.safetensors").unlink()
        case "manifest":
            (newest / "manifest.json").write_text("{}")
        case "trust":
            (newest / "trust.json").write_text('{"state": "cert')
        case "witness":
            (newest / "witness.safetensors").write_bytes(b"recorded")
            checkpoint.set_trust(newest, "certified", witness=newest / "witness.safetensors")
            (newest / "witness.safetensors").write_bytes(b"altered")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    choice = migrate.choose(snapshots, ledger)
    assert choice.step == 5 and len(choice.passed_over) == 1
    assert [warning.what for warning in of_kind(ledger.read(), Warned)] == ["snapshot passed over"]
    assert json.loads((newest / "trust.json").read_text())["state"] == "rejected"


def test_without_a_certified_snapshot_the_run_goes_back_to_its_start(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    checkpoint.save_snapshot(folder, 5, {"w": torch.ones(2)}, {}, {}, {})
    ledger = Ledger(tmp_path / "ledger.jsonl")
    choice = migrate.choose(folder, ledger)
    assert choice.step == 0 and choice.rejected == (5,)
    assert [warning.what for warning in of_kind(ledger.read(), Warned)] == ["no certified snapshot"]


def test_an_old_snapshot_under_a_newer_name_is_stale_and_passed_over(
    snapshots: Path, tmp_path: Path
) -> None:
    newest = checkpoint.path_of(snapshots, 10)
    shutil.rmtree(newest)
    shutil.copytree(checkpoint.path_of(snapshots, 5), newest)
    with pytest.raises(SnapshotError, match="stale"):
        checkpoint.verify(newest)
    choice = migrate.choose(snapshots, Ledger(tmp_path / "ledger.jsonl"))
    assert choice.step == 5
    assert any("stale" in told for told in choice.passed_over)
