"""Kill a run at any moment, give the same command again: the final weights are those of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(out: Path) -> list[str]:
    return [
        sys.executable, "-m", "bascule.cli", "run", str(ROOT / "runs" / "tiny.toml"), "--out", str(out), "--json",
        "--set", "pools.ascend.accelerator=cpu", "--set", "qualify.required=false", "--set", "qualify.time_limit_s=0.1",
        "--set", "sft.steps=15", "--set", "grpo.steps=6", "--set", "train.snapshot_every_steps=4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    start = time.perf_counter()
    done = subprocess.run(
        command(tmp_path_factory.mktemp("whole")), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)["final_weights_sha256"], time.perf_counter() - start


def finish(out: Path) -> dict:  # type: ignore[type-arg]
    done = subprocess.run(command(out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_sigkill_at_random_moments_changes_no_bit(
    tmp_path: Path, undisturbed: tuple[str, float], seed: int
) -> None:
    whole, seconds = undisturbed
    moments = np.random.default_rng(seed).uniform(0.25, 0.95, size=2) * seconds
    for moment in moments:
        process = subprocess.Popen(
            command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(float(moment))
        process.kill()
        process.wait()
    assert finish(tmp_path)["final_weights_sha256"] == whole


def _trainers(out: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"trainer" in words and any(str(out).encode() in word for word in words):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_killed_trainer_is_started_again_and_the_weights_do_not_change(
    tmp_path: Path, undisturbed: tuple[str, float]
) -> None:
    process = subprocess.Popen(
        command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    ledger = tmp_path / "tiny" / "ledger.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        ledger.exists() and '"step_stats"' in ledger.read_text()
    ):
        time.sleep(0.05)
    for pid in _trainers(tmp_path):
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    data = json.loads(output)
    assert data["final_weights_sha256"] == undisturbed[0]
    assert [one["sentinel"] for one in data["incidents"]] == ["watchdog: death"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_stop_request_finishes_the_step_snapshots_and_resumes(
    tmp_path: Path, undisturbed: tuple[str, float], number: int, code: int
) -> None:
    process = subprocess.Popen(
        command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    ledger = tmp_path / "tiny" / "ledger.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        ledger.exists() and '"step_stats"' in ledger.read_text()
    ):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    assert finish(tmp_path)["final_weights_sha256"] == undisturbed[0]


def test_a_corrupt_newest_snapshot_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, undisturbed: tuple[str, float]
) -> None:
    process = subprocess.Popen(
        command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    snapshots = tmp_path / "tiny" / "snapshots"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(snapshots.glob("step-*"))) < 3:
        time.sleep(0.02)
    process.kill()
    process.wait()
    newest = sorted(snapshots.glob("step-*"))[-1] / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0x10
    newest.write_bytes(data)
    answer = finish(tmp_path)
    assert answer["final_weights_sha256"] == undisturbed[0]
    assert any(one["what"] == "snapshot passed over" for one in answer["warnings"])
