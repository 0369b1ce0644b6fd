"""Snapshots written beside the loop hold the state of their step, fail loudly, and leave nothing half done."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
import torch

from bascule.train import checkpoint, loop
from bascule.train.state import TrainState
from bascule.train.step import NoJudge
from bascule.train.writer import SnapshotWriter


def save(writer, folder, step, weight):
    return writer.save(folder, step, {"w": weight}, {"steps_taken": step}, {}, {}, phase="sft")


def test_the_state_is_that_of_its_step_although_training_went_on(tmp_path):
    may_write = threading.Event()
    weight = torch.ones(3)
    writer = SnapshotWriter()
    writer._give(lambda: may_write.wait() and None)  # the disk is slow
    writer.wait = lambda: None  # type: ignore[method-assign]
    path = save(writer, tmp_path, 7, weight)
    weight.mul_(5)
    assert not path.exists()
    may_write.set()
    del writer.wait
    writer.wait()
    assert torch.equal(checkpoint.load(path).model["w"], torch.ones(3))


def test_the_next_snapshot_waits_for_the_one_in_flight(tmp_path):
    saved, waits = [], []
    may_go = threading.Event()

    def on_saved(step, path):
        may_go.wait()
        saved.append(step)

    def on_wait():
        waits.append(len(saved))
        may_go.set()

    writer = SnapshotWriter(on_saved, on_wait)
    save(writer, tmp_path, 1, torch.ones(1))
    save(writer, tmp_path, 2, torch.ones(1))
    assert saved[:1] == [1] and waits == [0]
    writer.wait()
    assert saved == [1, 2]


def test_a_failure_is_raised_in_the_loop_and_nothing_behind_it_is_done(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    certified = []
    writer = SnapshotWriter()
    save(writer, blocked, 3, torch.ones(1))
    writer._give(lambda: certified.append(3))
    with pytest.raises(OSError):
        writer.wait()
    writer.wait()
    assert certified == []


def test_a_run_that_writes_beside_its_loop_is_the_same_run(tiny, tmp_path):
    straight, beside = tiny(), tiny()
    saved = []
    loop.run(
        straight.stepper,
        straight.objectives,
        NoJudge(),
        TrainState(),
        straight.plan(tmp_path / "a"),
    )
    writer = SnapshotWriter(lambda step, path: saved.append(step))
    loop.run(
        beside.stepper, beside.objectives, NoJudge(), TrainState(), beside.plan(tmp_path / "b"), None, writer
    )  # fmt: skip
    assert beside.fingerprint() == straight.fingerprint()
    ours, theirs = (checkpoint.all_snapshots(tmp_path / name) for name in "ab")
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert saved == [checkpoint.step_of(path) for path in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert checkpoint.sha256(one) == checkpoint.sha256(other)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from bascule.train import checkpoint, storage
from bascule.train.writer import SnapshotWriter
writer = SnapshotWriter()
folder = Path(sys.argv[1])
writer.save(folder, 1, {"w": torch.ones(2)}, {}, {}, {})
writer.wait()
original = checkpoint.sha256_of
checkpoint.sha256_of = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # between the flush and the rename
writer.save(folder, 2, {"w": torch.zeros(2)}, {}, {}, {})
writer.wait()
"""


def test_a_kill_in_the_middle_of_a_write_loses_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    path, skipped = checkpoint.newest(tmp_path, at_least="saved")
    assert path is not None and checkpoint.step_of(path) == 1 and skipped == []
    assert len(list(tmp_path.glob(".step-*"))) == 1
    checkpoint.set_trust(path, "certified")
    checkpoint.prune(tmp_path, 2)
    assert list(tmp_path.glob(".step-*")) == []
