"""A drill plants on every choice, never judges another drill's ledger, and says so when it has shown nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bascule.accelerators.names import check_name
from bascule.faults.catalogue import load_profile
from bascule.folder import RunFolder
from bascule.ledger import Ledger
from bascule.records import Alarm, PoolCondemned
from bascule.stages.drill import _planted, folder_name, placed_at, planted_on
from bascule.stages.drilled import Drilled, Sighting, judge, look

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "qualify.required=false", "qualify.time_limit_s=0.1", "sft.steps=8", "train.snapshot_every_steps=4",
    'train.phases=["sft"]', "data.train_problems=64", "data.eval_problems=4", "pools.ascend.accelerator=cpu",
]  # fmt: skip


def command(out: Path, fault: str, *more: str) -> list[str]:
    words = [
        sys.executable, "-m", "bascule.cli", "drill", str(ROOT / "runs" / "tiny.toml"),
        "--out", str(out), "--json", "--fault", fault, *more,
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


@pytest.mark.parametrize(("all_of_them", "decoder"), [(True, "operators"), (False, "auto")])
def test_every_cell_of_the_table_decodes_as_the_run_it_is_held_against(
    all_of_them: bool, decoder: str
) -> None:
    """Faults of inference force operators; the undisturbed run must be made of them too, or its bits would differ without a fault."""
    asked = Namespace(all=all_of_them, recipe=str(ROOT / "runs" / "tiny.toml"), overrides=[])
    for fault in ("clean", "infer-bad"):
        assert _planted(asked, "ascend", fault, "x").train.rollout_decoder == decoder


def test_another_plant_has_another_folder_and_its_name_is_one_a_recipe_takes() -> None:
    names = {folder_name("tiny", plant) for plant in ("ascend-r2", "zeroed", "zeroed?rate=0.5&a=1")}
    assert names == {"tiny-drill-ascend-r2", "tiny-drill-zeroed", "tiny-drill-zeroed-rate-0.5-a-1"}


def test_a_window_of_steps_moves_as_a_whole_and_a_fault_of_inference_stays() -> None:
    assert placed_at("zeroed:high", 9) == "zeroed:high?onset_step=9"
    assert placed_at("transient?seed=2", 9) == "transient?seed=2&onset_step=9&until_step=9"
    assert placed_at("infer-bad", 9) == "infer-bad"
    assert placed_at("clean", 9) == "clean"
    check_name(f"sim:{placed_at('transient?seed=2', 9)}")


def drilled(fault: str = "zeroed", **found: Any) -> Drilled:
    return Drilled(fault, "sim:x@cpu", "a", "finished", 0, **found)


def verdict(one: Drilled, undisturbed: str | None = None) -> tuple[str, bool]:
    judge(one, load_profile(one.fault), undisturbed)
    return one.verdict, one.good


def test_a_drill_in_which_nothing_fired_is_no_success_unless_nothing_was_planted() -> None:
    assert verdict(drilled("clean")) == ("nothing fired, nothing cried: clean", True)
    said, good = verdict(drilled())
    assert not good and said.startswith("NOTHING FIRED")
    said, good = verdict(drilled(unfit_for=["train"]))
    assert good and "unfit for train" in said


def test_caught_missed_misnamed_and_false_alarms_are_told_apart() -> None:
    chip = ["persistent chip fault"]
    assert verdict(drilled(fired=3, attributions=chip)) == ("caught", True)
    assert verdict(drilled(fired=3, attributions=["unknown", *chip])) == ("caught", True)
    assert verdict(drilled(fired=3, attributions=["data", *chip]))[1] is False
    assert verdict(drilled(fired=3)) == ("MISSED", False)
    assert verdict(drilled(fired=3, attributions=["data"])) == ("caught, but called data", False)
    assert verdict(drilled("clean", attributions=["data", "data"]))[1] is False
    said, good = verdict(drilled(fired=3, attributions=chip, innocent_condemned=["b"]))
    assert not good and said.startswith("FALSE ALARM: b")


def test_final_weights_that_differ_are_no_success_and_equal_ones_make_an_unseen_fault_harmless() -> (
    None
):
    other = drilled(fired=3, attributions=["persistent chip fault"], final_weights_sha256="x")
    assert verdict(other, "y")[1] is False and other.weights_equal is False
    said, good = verdict(drilled(fired=3, final_weights_sha256="x"), "x")
    assert good and said.startswith("harmless")


def test_slow_is_seen_by_a_warning_and_wrong_is_not() -> None:
    warned = [Sighting(8, "step time", "slow", 1.0)]
    assert verdict(drilled("slow", fired=3, seen=warned)) == ("caught", True)
    assert verdict(drilled("zeroed", fired=3, seen=warned)) == ("MISSED", False)


def test_an_alarm_alone_does_not_catch_a_fault_and_an_innocent_pools_blame_is_told_apart(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path).create()
    folder.ground_truth.mkdir()
    (folder.ground_truth / "a-train.jsonl").write_text('{"role": "train", "step": 7}\n')
    ledger = Ledger(folder.ledger, attempt=1, pool="a")
    ledger.append(Alarm(step=8, sentinel="finite", measured=None, bound=None, detail="x"))
    found = drilled()
    look(found, folder)
    assert (found.fired, found.first_fired_step, verdict(found)) == (1, 7, ("MISSED", False))
    assert [(one.step, one.by) for one in found.seen] == [(8, "finite")]
    for pool in ("a", "b"):
        ledger.append(PoolCondemned(pool=pool, role="train", reason="x", incident_id=None))
    found = drilled()
    look(found, folder)
    assert (found.innocent_condemned, found.condemned) == (["b"], ["train"])


def test_a_profile_that_does_not_exist_is_refused_and_nothing_is_begun(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, "nosuch"), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no fault profile 'nosuch'" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_a_step_after_the_runs_end_is_refused_and_nothing_is_begun(tmp_path: Path) -> None:
    words = command(tmp_path, "zeroed", "--at-step", "9")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Name a step from 1 to 8" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_drill_catches_what_it_planted_and_sees_when_nothing_fired(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "zeroed", "--at-step", "3"), capture_output=True, text=True, check=False
    )
    data = json.loads(done.stdout)
    assert done.returncode == 0 and data["fired"] > 0 and data["verdict"] == "caught", done.stderr
    done = subprocess.run(command(tmp_path, "ageing"), capture_output=True, text=True, check=False)
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
