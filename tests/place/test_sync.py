"""Weights arrive as they were sent, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bascule.config.model import ModelConfig
from bascule.errors import SnapshotError
from bascule.model.transformer import Transformer
from bascule.model.weights import fingerprint, initialise
from bascule.place import sync


def model(seed: int) -> Transformer:
    made = Transformer(ModelConfig(preset="tick", vocab_size=40))
    initialise(made, seed)
    return made


def test_weights_arrive_bit_for_bit_with_tied_ones_written_once(tmp_path: Path) -> None:
    sent, got = model(1), model(2)
    path, sha256 = sync.publish(tmp_path, sent.state_dict(), 7)
    got.load_state_dict(sync.load(path, sha256, 7))
    assert fingerprint(got) == fingerprint(sent)
    assert got.lm_head.weight is got.model.embed_tokens.weight
    assert path.stat().st_size < 1.1 * sum(p.numel() * 4 for p in sent.parameters()) + 10_000


def test_equal_weights_have_equal_hashes(tmp_path: Path) -> None:
    _, first = sync.publish(tmp_path / "a", model(1).state_dict(), 3)
    _, second = sync.publish(tmp_path / "b", model(1).state_dict(), 3)
    assert first == second


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    path, sha256 = sync.publish(tmp_path, model(1).state_dict(), 7)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match="not loaded"):
        sync.load(path, sha256, 7)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path, sha256 = sync.publish(tmp_path, model(1).state_dict(), 7)
    with pytest.raises(SnapshotError, match="version 7, asked was version 8"):
        sync.load(path, sha256, 8)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="do not exist"):
        sync.load(tmp_path / "none.safetensors", "0" * 64, 1)


def test_old_versions_are_removed(tmp_path: Path) -> None:
    for version in range(5):
        sync.publish(tmp_path, {"x": torch.ones(3)}, version)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "weights-00000003.safetensors",
        "weights-00000004.safetensors",
    ]


def test_going_back_to_an_older_version_after_a_rollback_keeps_it(tmp_path: Path) -> None:
    for version in (8, 9):
        sync.publish(tmp_path, {"x": torch.ones(3)}, version)
    path, sha256 = sync.publish(tmp_path, {"x": torch.zeros(3)}, 4)
    assert sync.load(path, sha256, 4)["x"].tolist() == [0, 0, 0]
