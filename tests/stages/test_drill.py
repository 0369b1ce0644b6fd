"""A drill plants on every choice, never judges another drill's ledger, and says so when it has shown nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bascule.accelerators.registry import check_name
from bascule.folder import RunFolder
from bascule.ledger import Ledger
from bascule.records import Alarm, PoolCondemned
from bascule.stages.drill import folder_name, hold_against_truth, judgement, planted_on

ROOT = Path(__file__).resolve().parents[2]
NOTHING = {"false_alarms": 0, "fired": 0, "caught": None, "unfit_for": []}
SMALL = [
    "qualify.required=false", "qualify.time_limit_s=0.1", "sft.steps=8", "train.snapshot_every_steps=4",
    'train.phases=["sft"]', "data.train_problems=64", "data.eval_problems=4", "pools.ascend.accelerator=cpu",
]  # fmt: skip


def command(out: Path, plant: str) -> list[str]:
    words = [
        sys.executable, "-m", "bascule.cli", "drill", str(ROOT / "runs" / "tiny.toml"),
        "--out", str(out), "--json", "--plant", plant,
    ]  # fmt: skip
    return [*words, *(word for setting in SMALL for word in ("--set", setting))]


@pytest.mark.parametrize(
    ("accelerator", "planted"),
    [
        ("cpu", "sim:zeroed?rate=0.5@cpu"),
        ("cuda:1", "sim:zeroed?rate=0.5@cuda:1"),
        ("cuda|cpu", "sim:zeroed?rate=0.5@cuda|sim:zeroed?rate=0.5@cpu"),
        ("sim:clean", "sim:zeroed?rate=0.5@cpu"),
        ("sim:clean?rate=1@npu | cpu", "sim:zeroed?rate=0.5@npu|sim:zeroed?rate=0.5@cpu"),
    ],
)
def test_the_fault_is_planted_on_each_choice(accelerator: str, planted: str) -> None:
    assert planted_on(accelerator, "zeroed?rate=0.5") == planted
    for choice in planted.split("|"):
        check_name(choice)


def test_another_plant_has_another_folder_and_its_name_is_one_a_recipe_takes() -> None:
    names = {folder_name("tiny", plant) for plant in ("ascend-r2", "zeroed", "zeroed?rate=0.5&a=1")}
    assert names == {"tiny-drill-ascend-r2", "tiny-drill-zeroed", "tiny-drill-zeroed-rate-0.5-a-1"}


def test_a_drill_in_which_nothing_fired_is_no_success_unless_nothing_was_planted() -> None:
    assert judgement(NOTHING, has_faults=False) == ("nothing fired, nothing cried: clean", True)
    said, good = judgement(NOTHING, has_faults=True)
    assert not good and said.startswith("NOTHING FIRED")
    said, good = judgement({**NOTHING, "unfit_for": ["train"]}, has_faults=True)
    assert good and "unfit for train" in said


def test_caught_missed_and_false_alarms_are_told_apart() -> None:
    fired = {**NOTHING, "fired": 3}
    assert judgement({**fired, "caught": True}, has_faults=True) == ("caught", True)
    assert judgement({**fired, "caught": False}, has_faults=True) == ("MISSED", False)
    assert judgement({**NOTHING, "false_alarms": 2}, has_faults=False)[1] is False


def test_an_alarm_alone_does_not_catch_a_fault_and_another_pools_blame_does_not_count(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path).create()
    folder.ground_truth.mkdir()
    (folder.ground_truth / "a-train.jsonl").write_text('{"role": "train", "step": 7}\n')
    ledger = Ledger(folder.ledger, attempt=1, pool="a")
    ledger.append(Alarm(step=8, sentinel="finite", measured=None, bound=None, detail="x"))
    Ledger(folder.ledger, attempt=1, pool="b").append(
        PoolCondemned(pool="b", role="train", reason="x", incident_id=None)
    )
    found = hold_against_truth(folder, "a")
    assert (found["fired"], found["first_fired_step"], found["caught"]) == (1, 7, False)
    ledger.append(PoolCondemned(pool="a", role="train", reason="x", incident_id=None))
    assert hold_against_truth(folder, "a")["caught"] is True


def test_a_profile_that_does_not_exist_is_refused_and_nothing_is_begun(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, "nosuch"), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no fault profile 'nosuch'" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_drill_catches_what_it_planted_and_sees_when_nothing_fired(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "zeroed?onset_step=3"), capture_output=True, text=True, check=False
    )
    data = json.loads(done.stdout)
    assert done.returncode == 0 and data["fired"] > 0 and data["caught"] is True, done.stderr
    done = subprocess.run(
        command(tmp_path, "zeroed?onset_step=300"), capture_output=True, text=True, check=False
    )
    data = json.loads(done.stdout)
    assert done.returncode == 3 and data["fired"] == 0 and data["finished"], done.stderr


@pytest.mark.slow
def test_a_drill_that_is_asked_to_stop_ends_with_75(tmp_path: Path) -> None:
    drill = subprocess.Popen(
        command(tmp_path, "clean"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ledger = tmp_path / "tiny-drill-clean" / "ledger.jsonl"
    while drill.poll() is None and not (
        ledger.exists() and '"kind":"placement"' in ledger.read_text().replace(" ", "")
    ):
        time.sleep(0.1)
    drill.send_signal(signal.SIGTERM)
    assert drill.wait(timeout=120) == 75
