"""The watchdog on real processes: alive, hung, slow to start; where it hung; and why a worker ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bascule import errors
from bascule.guard import host, watchdog
from bascule.guard.watchdog import Ending, Watchdog, classify_exit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watching(path: Path) -> tuple[Watchdog, Clock]:
    clock = Clock()
    given = {"hang_timeout_s": 5.0, "start_timeout_s": 60.0}
    return Watchdog(path, **given, clock=clock, withheld_s=lambda _: 0.0), clock


def beat_as(path: Path, pid: int, step: int, time_s: float = 0.0, phase: str = "sft") -> None:
    path.write_text(json.dumps({"pid": pid, "step": step, "phase": phase, "time_s": time_s}))


def test_a_slow_start_is_not_a_hang(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    dog, clock = watching(path)
    clock.now += 59
    assert dog.judge(7).state == "starting"
    beat_as(path, 7, 0, phase=watchdog.STARTING)
    clock.now += 2
    assert dog.judge(7).state == "starting"
    clock.now += 61
    assert dog.judge(7).state == "slow start"


def test_silence_at_work_is_a_hang_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    dog, clock = watching(path)
    beat_as(path, 7, step=3)
    assert dog.judge(7).state == "alive"
    clock.now += 5.1
    health = dog.judge(7)
    assert health.state == "hung" and "step 3 (sft)" in health.reason and health.must_end


def test_a_worker_that_the_host_does_not_run_is_not_hung_but_one_that_spins_is_in_the_end(
    tmp_path: Path,
) -> None:
    """Found by the campaign of kills at the lowest priority on a crowded machine: a trainer that got no second of a minute was ended as
    hung at its first step, again and again."""
    path, clock, withheld = tmp_path / "trainer.json", Clock(), Clock()
    dog = Watchdog(path, hang_timeout_s=5, start_timeout_s=60, clock=clock, withheld_s=lambda _: withheld.now)  # fmt: skip
    beat_as(path, 7, step=3)
    assert dog.judge(7).state == "alive"
    clock.now, withheld.now = clock.now + 40, withheld.now + 36
    assert dog.judge(7).state == "alive"
    beat_as(path, 7, step=4)
    assert dog.judge(7).silent_s == 0
    clock.now += 4.9
    assert dog.judge(7).state == "alive", "what was withheld before the last beat counts no more"
    clock.now += 0.2
    assert dog.judge(7).state == "hung"
    clock.now, withheld.now = clock.now + 45, withheld.now + 45
    assert dog.judge(7).state == "hung", "ready all the while, for ten times its limit"


def test_what_a_host_withholds_is_read_of_the_process_itself() -> None:
    """Two processes that want the same core each wait for it about half the time."""
    code = "import os\ntry:\n os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nexcept (AttributeError, OSError):\n pass\nwhile True: pass"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(host.withheld_from_s(one.pid) > 0.05 for one in both):  # fmt: skip
            time.sleep(0.05)
        told = [host.withheld_from_s(one.pid) for one in both]
    finally:
        for one in both:
            one.kill()
            one.wait()
    if not Path("/proc/self/schedstat").exists():
        assert told == [0.0, 0.0]
    else:
        assert all(one > 0.05 for one in told)
    assert host.withheld_from_s(both[0].pid) == 0.0, "it is gone"


def test_every_beat_is_progress_whatever_the_workers_clock_says(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    dog, clock = watching(path)
    for tick in range(20):
        beat_as(path, 7, step=3, time_s=-tick)
        assert dog.judge(7).state == "alive"
        clock.now += 4.5


def test_a_beat_of_an_earlier_launch_is_not_progress(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    beat_as(path, 6, step=99)
    dog, clock = watching(path)
    assert dog.judge(7).state == "starting"


def test_half_a_file_reads_as_no_beat(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"pid": 3, "st')
    assert watchdog.read(path) is None
    watchdog.beat(path, 12, "grpo")
    found = watchdog.read(path)
    assert found is not None and (found.step, found.phase) == (12, "grpo")


WORKER = """
import sys, time
from pathlib import Path
from bascule.guard import host, watchdog
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
        while not (health := dog.judge(process.pid)).must_end:
            time.sleep(0.02)
        assert health.state == "hung"
        stacks = watchdog.capture_stacks(process.pid, tmp_path / "stacks.txt")
        assert watchdog.standing_at(stacks).startswith("stuck_in_a_collective (<string>:")
    finally:
        process.kill()
        process.wait()
    ending = classify_exit(process.returncode, tmp_path / "ending.json", health=health)
    assert ending.error == "Hang" and "no progress" in ending.message
    assert classify_exit(process.returncode, tmp_path / "ending.json").error == "Death"


def test_no_stacks_name_no_place() -> None:
    assert watchdog.standing_at("") == ""


def test_the_workers_own_word_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "ending.json"
    watchdog.write_ending(file, errors.ChipCondemned("r2 multiplies wrongly", incident_id="i-7"))
    ending = classify_exit(5, file)
    assert ending == Ending("ChipCondemned", "r2 multiplies wrongly", 5, "i-7")
    assert ending.attribution == "persistent chip fault"
    watchdog.write_ending(file, errors.RollbackNeeded("once", incident_id="i-8"))
    assert classify_exit(4, file).attribution == "transient chip fault"
    watchdog.write_ending(file, errors.OperatorMissing("aten::mm is missing"))
    assert classify_exit(5, file).attribution == "software"


def test_a_stale_word_does_not_explain_another_death(tmp_path: Path) -> None:
    file = tmp_path / "ending.json"
    watchdog.write_ending(file, errors.ChipCondemned("old", incident_id="i-1"))
    ending = classify_exit(-signal.SIGKILL, file)
    assert ending.error == "Death" and "SIGKILL" in ending.message


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (0, None, "finished"),
        (1, "OwnFault", "error of our own"),
        (-signal.SIGKILL, "Death", "the device vanished"),
        (-signal.SIGSEGV, "Death", "crashed with SIGSEGV"),
        (-signal.SIGTERM, "Death", "from outside"),
        (87, "Death", "exit code 87"),
    ],
)
def test_every_exit_code_without_a_word_has_a_reason(
    tmp_path: Path, code: int, error: str | None, words: str
) -> None:
    ending = classify_exit(code, tmp_path / "none.json")
    assert (ending.error, ending.exit_code) == (error, code) and words in ending.message
