"""A store holds whole snapshots or none, whatever goes wrong on the way, and a run takes up from it when its folder is gone."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from bascule.errors import SnapshotError, UsageError
from bascule.folder import RunFolder
from bascule.ledger import of_kind
from bascule.records import Warned
from bascule.stages import run as stage
from bascule.train import checkpoint
from bascule.train.store import SnapshotStore, check_url
from tests import in_process


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    yield "memory://runs" if request.param == "memory" else f"file://{tmp_path}/store"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def open_store(url, recipe="abc"):
    return SnapshotStore(url, "r", recipe)


def snapshot(folder, step, *, value=1.0):
    path = checkpoint.save_snapshot(
        folder, step, {"w": torch.full((3,), value)}, {"m": torch.zeros(2)}, {}, {"recipe_sha256": "abc"}, phase="sft",
    )  # fmt: skip
    checkpoint.set_trust(path, "verified")
    return path


def names(folder):
    return sorted(path.name for path in folder.glob("*"))


def test_what_was_stored_comes_back_bit_for_bit_with_its_trust(url, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    path = snapshot(here, 4)
    store = open_store(url)
    store.catch_up(here)
    (path / "witness.safetensors").write_bytes(b"witness")
    checkpoint.set_trust(path, "certified", "agreed", witness=path / "witness.safetensors")
    store.catch_up(here)
    assert open_store(url).fetch(there) == ["step-00000004"]
    for file in path.iterdir():
        assert (there / path.name / file.name).read_bytes() == file.read_bytes()
    assert checkpoint.newest(there)[0] == there / path.name


def test_the_store_forgets_what_the_folder_pruned_and_takes_changed_bits_of_a_step(url, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    store = open_store(url)
    for step in (2, 4, 6):
        snapshot(here, step)
    store.catch_up(here)
    shutil.rmtree(here / "step-00000002")
    shutil.rmtree(here / "step-00000006")
    snapshot(here, 6, value=2.0)
    store.catch_up(here)
    assert open_store(url).fetch(there) == ["step-00000004", "step-00000006"]
    assert float(checkpoint.load(there / "step-00000006").model["w"][0]) == 2.0


def test_nothing_is_sent_twice(url, tmp_path, monkeypatch):
    store = open_store(url)
    snapshot(tmp_path / "here", 2)
    store.catch_up(tmp_path / "here")
    sent: list[str] = []
    monkeypatch.setattr(store, "_put", lambda name, file, sha256: sent.append(file.name))
    store.catch_up(tmp_path / "here")
    assert sent == []
    checkpoint.set_trust(tmp_path / "here" / "step-00000002", "certified")
    store.catch_up(tmp_path / "here")
    assert sent == ["trust.json"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fails_at", range(7))
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "injected"), Killed()])
def test_an_upload_cut_off_anywhere_leaves_no_snapshot_or_a_whole_one(
    fails_at, failure, tmp_path, monkeypatch
):
    """Also when the same step was there before with other bits. The next writer mends it."""
    url, here = f"file://{tmp_path}/store", tmp_path / "here"
    store = open_store(url)
    snapshot(here, 2)
    store.catch_up(here)
    shutil.rmtree(here / "step-00000002")
    snapshot(here, 2, value=2.0)
    snapshot(here, 4)
    whole, calls = LocalFileSystem.put_file, iter(range(100))

    def put_file(self, source, target, **more):
        if next(calls) == fails_at:
            Path(target).write_bytes(Path(source).read_bytes()[:-9])  # torn
            raise failure
        whole(self, source, target, **more)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", put_file)
        with pytest.raises(type(failure)):
            store.catch_up(here)
    there = tmp_path / "there"
    there.mkdir()
    try:
        brought = open_store(url).fetch(there)
    except SnapshotError:  # a torn manifest, found out
        brought = []
    for name in brought:
        assert (there / name / "manifest.json").read_bytes() == (
            here / name / "manifest.json"
        ).read_bytes()
        checkpoint.verify(there / name)
    open_store(url).catch_up(here)
    again = tmp_path / "again"
    again.mkdir()
    assert open_store(url).fetch(again) == ["step-00000002", "step-00000004"]


def test_a_store_that_changes_bytes_is_noticed_when_they_are_read_back(tmp_path, monkeypatch):
    whole = LocalFileSystem.put_file

    def put_file(self, source, target, **more):
        whole(self, source, target, **more)
        Path(target).write_bytes(b"x" + Path(target).read_bytes()[1:])

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
    snapshot(tmp_path / "here", 2)
    with pytest.raises(OSError, match="reads back with hash"):
        open_store(f"file://{tmp_path}/store").catch_up(tmp_path / "here")


def test_rotten_files_are_not_fetched(url, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    for step in (2, 4):
        snapshot(here, step)
    store = open_store(url)
    store.catch_up(here)
    store.files.pipe_file(f"{store.root}/step-00000004/model.safetensors", b"rot")
    assert open_store(url).fetch(there) == ["step-00000002"]
    store.files.pipe_file(f"{store.root}/step-00000002/model.safetensors", b"rot")
    shutil.rmtree(there / "step-00000002")
    with pytest.raises(SnapshotError, match=r"damaged snapshots only.*model\.safetensors"):
        open_store(url).fetch(there)


def test_another_recipes_store_is_refused(url, tmp_path):
    snapshot(tmp_path / "here", 2)
    open_store(url).catch_up(tmp_path / "here")
    with pytest.raises(SnapshotError, match="snapshots of recipe abc.*this run's is def"):
        open_store(url, "def")


def test_a_url_that_cannot_be_opened_is_refused_in_plain_words(monkeypatch):
    with pytest.raises(UsageError, match="nosuch://x.*no URL that fsspec knows"):
        check_url("nosuch://x")

    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", missing)
    with pytest.raises(
        UsageError, match=r"driver that is not installed.*pip install 'bascule\[s3\]'"
    ):
        check_url("s3://bucket/run")


# ---- a whole run


def recipe(url):
    return in_process.recipe(
        "cpu", sft={"steps": 8, "batch_sequences": 4}, data={"train_problems": 64},
        train={"snapshot_every_steps": 3, **({"snapshots": url} if url else {})},
    )  # fmt: skip


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_a_run_whose_folder_is_lost_ends_with_the_same_bits(url, tmp_path):
    run = in_process.run
    plain = in_process.weights_of(run(recipe(None), tmp_path / "plain")[1])

    class Lost(BaseException):
        pass

    def wrap(objective):
        whole = objective.next_batch

        def next_batch(step):
            if step == 8:
                raise Lost
            return whole(step)

        objective.next_batch = next_batch
        return objective

    with pytest.raises(Lost):
        run(recipe(url), tmp_path / "first", wrap)
    shutil.rmtree(tmp_path / "first")
    code, records = run(recipe(url), tmp_path / "second")
    assert code == 0 and in_process.weights_of(records) == plain
    taken = [one for one in of_kind(records, Warned) if one.what == "taken up from the store"]
    assert len(taken) == 1 and "step-0000000" in taken[0].detail
    assert min(one.step for one in records if one.kind == "step_stats") > 3


def test_a_store_that_is_away_is_said_and_stops_nobody(tmp_path, monkeypatch):
    def away(self, source, target, **more):
        raise OSError(errno.EHOSTUNREACH, "no route")

    monkeypatch.setattr(LocalFileSystem, "put_file", away)
    code, records = in_process.run(recipe(f"file://{tmp_path}/store"), tmp_path / "r")
    said = [one for one in of_kind(records, Warned) if one.what == "snapshot not stored"]
    assert code == 0 and said and "no route" in said[0].detail


def test_a_slip_in_the_url_does_not_tie_the_runs_folder_to_it(tmp_path):
    """The run must not have begun: the corrected command would be refused as another recipe's."""
    with pytest.raises(UsageError, match="no URL that fsspec knows"):
        stage.run(recipe("nosuch://x"), RunFolder(tmp_path / "r"))
    assert not (tmp_path / "r" / "recipe.json").exists()
    assert not (tmp_path / "r" / "ledger.jsonl").exists()


def test_snapshots_keep_to_their_budget_on_the_disk_and_say_when_they_cannot(tmp_path):
    made = recipe(None)
    tight = made.model_copy(update={"train": made.train.model_copy(update={"snapshots_gib": 1e-6})})
    code, records = in_process.run(tight, tmp_path)
    assert code == 0
    told = [one for one in of_kind(records, Warned) if one.what == "snapshots over their budget"]
    assert len(told) == 1, "once a launch"
    certified = [
        p
        for p in checkpoint.all_snapshots(tmp_path / "snapshots")
        if checkpoint.trust(p).state == "certified"
    ]
    wide = len(list((tmp_path / "snapshots").glob("step-*")))
    assert certified and wide < 4
