"""Kill a run at any moment, give the same command again: the final weights are those of an undisturbed run, bit for bit.

A launch costs seconds of importing torch, so the default run deals a run three blows one after another; the slow tests deal them apart.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bascule.stages.run import _signals

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


def begin(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(out), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def steps_written(out: Path) -> int:
    ledger = out / "tiny" / "ledger.jsonl"
    return ledger.read_text().count('"step_stats"') if ledger.exists() else 0


def wait_for(met: Callable[[], bool]) -> None:
    """Or for three minutes: on a machine that crowded the blow falls where it falls."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not met():
        time.sleep(0.02)


def spoil_newest(out: Path) -> None:
    newest = sorted((out / "tiny" / "snapshots").glob("step-*"))[-1] / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0x10
    newest.write_bytes(data)


@pytest.mark.timeout(1200)  # four launches: half a minute of two idle cores
def test_stopped_then_killed_then_its_newest_snapshot_spoilt_and_no_bit_changes(
    tmp_path: Path, undisturbed: tuple[str, float]
) -> None:
    stopped = begin(tmp_path)
    wait_for(lambda: steps_written(tmp_path) > 0)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=180)
    assert stopped.returncode == 75
    before = steps_written(tmp_path)
    killed = begin(tmp_path)
    wait_for(lambda: steps_written(tmp_path) >= before + 5)
    killed.kill()
    killed.communicate()
    spoil_newest(tmp_path)
    answer = finish(tmp_path)
    assert answer["final_weights_sha256"] == undisturbed[0]
    assert any(one["what"] == "snapshot passed over" for one in answer["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_sigkill_at_random_moments_changes_no_bit(
    tmp_path: Path, undisturbed: tuple[str, float], seed: int
) -> None:
    whole, seconds = undisturbed
    moments = np.random.default_rng(seed).uniform(0.25, 0.95, size=2) * seconds
    for moment in moments:
        process = begin(tmp_path)
        time.sleep(float(moment))
        process.kill()
        process.communicate()
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
    process = begin(tmp_path)
    wait_for(lambda: steps_written(tmp_path) > 0)
    for pid in _trainers(tmp_path):
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    data = json.loads(output)
    assert data["final_weights_sha256"] == undisturbed[0]
    assert [one["sentinel"] for one in data["incidents"]] == ["watchdog: death"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], 75),
        ([signal.SIGINT], 130),
        ([signal.SIGINT] * 2, 130),
        ([signal.SIGHUP], 75),
    ],
)
def test_after_a_stop_request_the_same_command_goes_on(
    tmp_path: Path, undisturbed: tuple[str, float], numbers: list[int], code: int
) -> None:
    process = begin(tmp_path)
    wait_for(lambda: steps_written(tmp_path) > 0)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    process.communicate(timeout=180)
    assert process.returncode == code
    assert finish(tmp_path)["final_weights_sha256"] == undisturbed[0]


def test_a_second_ctrl_c_does_not_wait_for_the_snapshot() -> None:
    with _signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_corrupt_newest_snapshot_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, undisturbed: tuple[str, float]
) -> None:
    process = begin(tmp_path)
    wait_for(lambda: len(list((tmp_path / "tiny" / "snapshots").glob("step-*"))) >= 3)
    process.kill()
    process.communicate()
    spoil_newest(tmp_path)
    answer = finish(tmp_path)
    assert answer["final_weights_sha256"] == undisturbed[0]
    assert any(one["what"] == "snapshot passed over" for one in answer["warnings"])
