"""The watchdog on real processes: alive, hung, dead, slow to start; and why a worker ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bascule import errors
from bascule.guard import watchdog
from bascule.guard.watchdog import Beat, Watchdog, classify_exit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watching(path: Path) -> tuple[Watchdog, Clock]:
    clock = Clock()
    return Watchdog(path, hang_timeout_s=5, start_timeout_s=60, clock=clock), clock


def beat_as(path: Path, pid: int, step: int, time_s: float = 0.0) -> None:
    path.write_text(
        json.dumps({"pid": pid, "step": step, "phase": "sft", "time_s": time_s, "detail": ""})
    )


def test_a_slow_start_is_not_a_hang(tmp_path: Path) -> None:
    dog, clock = watching(tmp_path / "trainer.json")
    clock.now += 59
    assert dog.judge(7, None).state == "starting"
    clock.now += 2
    assert dog.judge(7, None).state == "slow start"


def test_no_progress_is_a_hang_although_the_beats_go_on(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    dog, clock = watching(path)
    for tick in range(8):
        beat_as(path, 7, step=3, time_s=tick)
        health = dog.judge(7, None)
        clock.now += 1
    assert health.state == "hung" and "step 3" in health.reason and health.must_end


def test_progress_keeps_a_slow_worker_alive(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    dog, clock = watching(path)
    for step in range(20):
        beat_as(path, 7, step)
        assert dog.judge(7, None).state == "alive"
        clock.now += 4.5
    assert dog.slowest_s == pytest.approx(4.5)


def test_a_beat_of_an_earlier_launch_is_not_progress(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    beat_as(path, 6, step=99)
    dog, clock = watching(path)
    assert dog.judge(7, None).state == "starting"


def test_death_and_finish_come_from_the_exit_code(tmp_path: Path) -> None:
    dog, _ = watching(tmp_path / "x.json")
    assert dog.judge(7, -9).state == "dead"
    assert dog.judge(7, 0).state == "finished"


def test_half_a_file_reads_as_no_beat(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"pid": 3, "st')
    assert watchdog.read(path) is None
    watchdog.beat(path, 12, "grpo", "rollout")
    found = watchdog.read(path)
    assert found is not None and (found.step, found.phase, found.detail) == (12, "grpo", "rollout")


WORKER = """
import sys, time
from pathlib import Path
from bascule.guard import watchdog
watchdog.arm_stacks(Path(sys.argv[1]) / "stacks.txt")
def stuck_in_a_collective():
    watchdog.beat(Path(sys.argv[1]) / "trainer.json", 1, "sft")
    time.sleep(60)
stuck_in_a_collective()
"""


def test_a_hung_process_is_told_from_a_dead_one_and_its_stack_is_captured(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)])
    dog = Watchdog(tmp_path / "trainer.json", hang_timeout_s=0.4, start_timeout_s=30)
    try:
        deadline = time.monotonic() + 20
        while (health := dog.judge(process.pid, process.poll())).state in (
            "starting",
            "alive",
        ) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert health.state == "hung"
        assert "stuck_in_a_collective" in watchdog.capture_stacks(
            process.pid, tmp_path / "stacks.txt"
        )
    finally:
        process.kill()
        process.wait()
    assert dog.judge(process.pid, process.poll()).state == "dead"
    ending = classify_exit(
        process.returncode, watchdog.read(tmp_path / "trainer.json"), health=health
    )
    assert ending.reason.startswith("hung") and ending.retry


def test_the_workers_own_word_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "ending.json"
    watchdog.write_ending(file, errors.ChipCondemned("r2 multiplies wrongly", incident_id="i-7"))
    ending = classify_exit(5, Beat(1, 12, "sft", 0.0), file)
    assert (ending.attribution, ending.incident_id, ending.retry) == (
        "persistent chip fault",
        "i-7",
        False,
    )
    watchdog.write_ending(file, errors.RollbackNeeded("once", incident_id="i-8"))
    ending = classify_exit(4, None, file)
    assert (ending.attribution, ending.retry) == ("transient chip fault", True)
    watchdog.write_ending(file, errors.OperatorMissing("aten::mm is missing"))
    assert classify_exit(5, None, file).attribution == "software"


def test_a_stale_word_does_not_explain_another_death(tmp_path: Path) -> None:
    file = tmp_path / "ending.json"
    watchdog.write_ending(file, errors.ChipCondemned("old", incident_id="i-1"))
    assert "SIGKILL" in classify_exit(-signal.SIGKILL, Beat(1, 3, "sft", 0.0), file).reason


@pytest.mark.parametrize(
    ("code", "attribution", "exit_code", "retry"),
    [
        (6, "capacity", 6, False),
        (2, "software", 2, False),
        (1, "software", 1, False),
        (75, "unknown", 75, False),
        (-signal.SIGKILL, "unknown", 5, True),
        (-signal.SIGSEGV, "software", 5, True),
        (-signal.SIGTERM, "unknown", 143, False),
        (87, "unknown", 5, True),
    ],
)
def test_every_exit_code_has_a_reason(
    code: int, attribution: str, exit_code: int, retry: bool
) -> None:
    ending = classify_exit(code, Beat(1, 12, "sft", 0.0))
    assert (ending.attribution, ending.exit_code, ending.retry) == (attribution, exit_code, retry)
    assert "step 12" in ending.reason


def test_the_rank_that_lags_is_named_and_no_innocent_one() -> None:
    beats = [Beat(1, 40, "sft", 0.0), Beat(2, 40, "sft", 0.0), Beat(3, 39, "sft", 0.0)]
    assert watchdog.guilty_ranks(beats) == [2]
    assert watchdog.guilty_ranks(beats[:2]) == []
    assert watchdog.guilty_ranks([beats[0], None]) == [1]
