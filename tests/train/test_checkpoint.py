"""A snapshot is whole or refused, trust only rises or ends, and pruning never takes the last way back."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import time

import pytest
import torch

from bascule.errors import SnapshotError
from bascule.train import checkpoint
from bascule.train.checkpoint import Trust


def save(folder, step, *, value=1.0, extra=None):
    model = {
        "w": torch.full((3, 2), value),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.arange(3),
    }
    return checkpoint.save_snapshot(
        folder,
        step,
        model,
        {"first/w": torch.zeros(2), "steps_taken": 7},
        {},
        extra or {},
        phase="sft",
    )


def certify(path):
    checkpoint.set_trust(path, "verified")
    return checkpoint.set_trust(path, "certified", "audits agree")


def test_a_snapshot_comes_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 12, extra={"recipe_sha256": "abc"})
    found = checkpoint.load(path)
    assert (
        path.name == "step-00000012"
        and found.step == 12
        and found.phase == "sft"
        and found.extra == {"recipe_sha256": "abc"}
    )
    assert (
        torch.equal(found.model["w"], torch.ones(3, 2))
        and found.model["half"].dtype == torch.bfloat16
    )
    assert found.optimizer["steps_taken"] == 7 and found.objective == {} and found.warnings == ()
    assert checkpoint.trust(path) == Trust("saved")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "objective.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_any_damage_to_any_file_is_refused_by_name(tmp_path, name, damage):
    path = save(tmp_path, 1)
    data = bytearray((path / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    if damage == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    with pytest.raises(SnapshotError, match=name):
        checkpoint.verify(path)
    with pytest.raises(SnapshotError, match=name):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state.json": {}}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(SnapshotError, match="manifest"):
        checkpoint.verify(path)


def test_newest_passes_over_damaged_snapshots_and_says_why(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    for path in paths[:3]:
        certify(path)
    (paths[2] / "model.safetensors").write_bytes(b"torn")
    (paths[1] / "trust.json").write_text("{")
    found, skipped = checkpoint.newest(tmp_path)
    assert found == paths[0]
    assert len(skipped) == 2 and "model.safetensors" in skipped[0] and "trust.json" in skipped[1]
    assert checkpoint.newest(tmp_path, "saved") == (paths[3], [])


def test_without_snapshots_there_is_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(tmp_path / "never made") == (None, [])


def test_what_a_killed_writer_left_is_no_snapshot_and_is_swept_up(tmp_path):
    path = save(tmp_path, 1)
    certify(path)
    left = tmp_path / ".step-00000002.tmp-1"
    shutil.copytree(path, left)
    assert checkpoint.all_snapshots(tmp_path) == [path]
    assert checkpoint.prune(tmp_path, 3) == [left] and not left.exists()


def test_trust_rises_and_rejection_is_final(tmp_path):
    path = save(tmp_path, 1)
    certify(path)
    assert checkpoint.set_trust(path, "verified").state == "certified"
    checkpoint.set_trust(path, "rejected", "chip condemned")
    with pytest.raises(SnapshotError, match="chip condemned"):
        checkpoint.set_trust(path, "certified")
    assert checkpoint.newest(tmp_path) == (None, [])


def test_saving_equal_content_again_keeps_the_trust_and_new_content_starts_anew(tmp_path):
    certify(save(tmp_path, 1))
    assert checkpoint.trust(save(tmp_path, 1)).state == "certified"
    path = save(tmp_path, 1, value=2.0)
    assert checkpoint.trust(path).state == "saved"
    assert torch.equal(checkpoint.load(path).model["w"], torch.full((3, 2), 2.0))


def test_a_rejected_step_that_is_computed_again_is_saved_anew(tmp_path):
    checkpoint.set_trust(save(tmp_path, 1), "rejected", "left behind")
    assert checkpoint.trust(save(tmp_path, 1)) == Trust("saved")


def test_prune_keeps_the_newest_certified_ones_and_all_that_is_newer(tmp_path):
    paths = [save(tmp_path, step) for step in range(1, 7)]
    for step in (1, 2, 4, 5):
        certify(paths[step - 1])
    assert checkpoint.prune(tmp_path, 2) == paths[:3]
    assert checkpoint.all_snapshots(tmp_path) == paths[3:]
    assert (
        checkpoint.prune(tmp_path, 0) == [paths[3]] and checkpoint.newest(tmp_path)[0] == paths[4]
    )


def test_a_budget_of_bytes_drops_generations_but_never_the_newest_trusted_nor_what_waits(tmp_path):
    paths = [save(tmp_path, step) for step in range(1, 7)]
    for step in (1, 3, 5):
        certify(paths[step - 1])
    one = checkpoint.bytes_of(tmp_path) / 6
    assert checkpoint.prune(tmp_path, 9, most_bytes=4.5 * one) == paths[:2]
    assert checkpoint.prune(tmp_path, 9, most_bytes=1.5 * one) == paths[2:4]
    assert checkpoint.prune(tmp_path, 9, most_bytes=1.0) == []
    assert checkpoint.all_snapshots(tmp_path) == paths[4:]
    assert checkpoint.bytes_of(tmp_path, paths[5]) == pytest.approx(one, rel=0.01)


def test_prune_deletes_nothing_while_nothing_is_certified(tmp_path):
    paths = [save(tmp_path, step) for step in range(5)]
    assert checkpoint.prune(tmp_path, 1) == [] and checkpoint.all_snapshots(tmp_path) == paths
    checkpoint.prune(tmp_path, 2, at_least="saved")
    assert checkpoint.all_snapshots(tmp_path) == paths[3:]


def test_other_circumstances_are_told(tmp_path):
    path = save(tmp_path, 1)
    torch.set_num_threads(2)
    try:
        (warning,) = checkpoint.load(path).warnings
    finally:
        torch.set_num_threads(1)
    assert "threads 1" in warning and "has 2" in warning


def test_a_witness_holds_the_step_and_is_bound_to_its_snapshot_by_hash(tmp_path, tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    proposal = run.stepper.propose(run.sft.next_batch(1))
    path = save(tmp_path / "snapshots", 0)
    file = checkpoint.write_witness(tmp_path / "witness" / "step-1.safetensors", proposal)
    trust = checkpoint.set_trust(path, "verified", witness=file)
    assert (path.parent / trust.witness).resolve() == file
    got = checkpoint.read_witness(file, trust.witness_sha256)
    assert got.loss == proposal.loss and got.grad_norm == proposal.grad_norm and got.batch.step == 1
    assert all(torch.equal(t, got.batch.tensors[n]) for n, t in proposal.batch.tensors.items())
    assert all(torch.equal(g, got.grads[n]) for n, g in proposal.grads.items())
    assert got.grad_norms["model.norm.weight"] == pytest.approx(
        float(proposal.grads["model.norm.weight"].norm())
    )
    replay = run.stepper.recompute(got.batch)
    assert replay.loss == got.loss
    assert checkpoint.set_trust(path, "certified").witness == trust.witness
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(SnapshotError, match="hash differs"):
        checkpoint.read_witness(file, trust.witness_sha256)
    with pytest.raises(SnapshotError):
        checkpoint.read_witness(file)


def test_no_file_of_a_snapshot_is_a_pickle(tmp_path):
    path = save(tmp_path, 1)
    for file in path.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert file.suffix == ".safetensors"


def _save_for_ever(folder, first):
    for step in itertools.count(first):
        path = save(folder, step, value=float(step))
        checkpoint.set_trust(path, "certified")
        checkpoint.prune(folder, 2)


def test_a_writer_killed_at_any_moment_leaves_a_whole_snapshot_behind(tmp_path):
    newest = 0
    certify(save(tmp_path, newest, value=0.0))
    for kill in range(8):
        writer = multiprocessing.get_context("fork").Process(
            target=_save_for_ever, args=(tmp_path, newest + 1)
        )
        writer.start()
        while not checkpoint.path_of(tmp_path, newest + 2).exists():
            time.sleep(0.001)
        time.sleep(0.007 * kill)
        writer.kill()
        writer.join()
        path, skipped = checkpoint.newest(tmp_path)
        assert path is not None and skipped == []
        found = checkpoint.load(path)
        assert torch.equal(found.model["w"], torch.full((3, 2), float(found.step)))
        newest = found.step
    assert newest >= 8


@pytest.mark.parametrize(
    "change", [{"colour": "red"}, {"state": ["saved"]}, {"reason": 5}], ids=str
)
def test_a_trust_file_with_other_fields_is_damage(tmp_path, change):
    path = save(tmp_path, 1)
    value = json.loads((path / "trust.json").read_text())
    (path / "trust.json").write_text(json.dumps(value | change))
    with pytest.raises(SnapshotError, match=r"trust\.json holds"):
        checkpoint.trust(path)
    assert checkpoint.newest(tmp_path, "saved")[0] is None


def _dead_pid():
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    return process.pid


def test_a_snapshot_whose_writer_was_killed_while_replacing_it_gets_its_name_back(tmp_path):
    path = save(tmp_path, 1)
    certify(path)
    path.rename(tmp_path / f".{path.name}.old-{_dead_pid()}")
    assert checkpoint.newest(tmp_path) == (path, [])
    path.rename(tmp_path / f".{path.name}.old-{os.getpid()}")
    assert checkpoint.all_snapshots(tmp_path) == [path]


def test_a_snapshot_that_a_live_writer_replaces_is_its_own_to_name_until_the_next_save(tmp_path):
    path = save(tmp_path, 1)
    aside = path.rename(tmp_path / f".{path.name}.old-{os.getppid()}")
    assert checkpoint.all_snapshots(tmp_path) == [] and aside.exists()
    other = save(tmp_path, 2)
    assert checkpoint.all_snapshots(tmp_path) == [path, other]
    assert checkpoint.prune(tmp_path, 2, at_least="saved") == []
