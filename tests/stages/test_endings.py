"""How a run ends or goes on when a chip fails in each of the loud ways, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bascule.cli import main
from bascule.ledger import of_kind, read_ledger
from bascule.records import Incident, Warned
from tests import in_process

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "qualify.required=false", "qualify.time_limit_s=0.1", "sft.steps=12", "train.snapshot_every_steps=4",
    'train.phases=["sft"]', "data.train_problems=64", "data.eval_problems=4",
]  # fmt: skip


def run(out: Path, *settings: str, recipe: str = "tiny") -> tuple[int, dict[str, Any], str]:
    command = [
        sys.executable,
        "-m",
        "bascule.cli",
        "run",
        str(ROOT / "runs" / f"{recipe}.toml"),
        "--out",
        str(out),
        "--json",
    ]
    for setting in [*SMALL, *settings]:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout), done.stderr


def only(accelerator: str) -> list[str]:
    """Both pools the same chip: there is nowhere to go."""
    return [f"pools.ascend.accelerator={accelerator}", f"pools.nvidia.accelerator={accelerator}"]


@pytest.mark.slow
def test_a_dead_chip_is_left_for_the_next_pool(tmp_path: Path) -> None:
    code, data, _ = run(
        tmp_path,
        "pools.ascend.accelerator=sim:dies?onset_step=6@cpu",
        "pools.nvidia.accelerator=cpu",
    )
    assert code == 0 and data["status"] == "finished"
    assert {one["sentinel"] for one in data["incidents"]} == {"watchdog: death"}
    assert data["placements"][-1]["train"] == "nvidia"


@pytest.mark.slow
def test_a_hanging_chip_is_noticed_by_its_silence(tmp_path: Path) -> None:
    code, data, _ = run(
        tmp_path,
        "pools.ascend.accelerator=sim:hang?onset_step=6@cpu",
        "pools.nvidia.accelerator=cpu",
        "guard.hang_timeout_s=12",
    )
    assert code == 0 and data["status"] == "finished"
    assert {one["sentinel"] for one in data["incidents"]} == {"watchdog: hang"}
    assert data["placements"][-1]["train"] == "nvidia"
    incident = of_kind(read_ledger(tmp_path / "tiny" / "ledger.jsonl"), Incident)[0]
    assert "it stood in" in incident.evidence
    assert "simulated.py" in (tmp_path / "tiny" / incident.folder / "stacks.txt").read_text()


@pytest.mark.parametrize(
    ("chip", "spare", "code", "words"),
    [
        ("sim:oom?onset_step=3@cpu", "sim:oom?onset_step=3@cpu", 6, "memory"),
        ("sim:corrupt@cpu", "sim:backward-wrong@cpu", 5, "No pool"),
    ],
)
def test_with_no_sound_pool_left_the_code_and_the_words_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], chip: str, spare: str, code: int, words: str
) -> None:
    """Without processes: how a worker's ending becomes the supervisor's. That it does so between processes: the tests around."""
    recipe = in_process.recipe(chip, spare=spare, sft={"steps": 8, "batch_sequences": 4})
    assert in_process.run(recipe, tmp_path)[0] == code
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_missing_operator_with_no_other_pool_ends_with_5(tmp_path: Path) -> None:
    code, _, words = run(tmp_path, *only("sim:missing-op@cpu"))
    assert code == 5 and "No pool" in words


@pytest.mark.slow
def test_divergence_that_is_nobodys_chip_ends_with_4(tmp_path: Path) -> None:
    code, _, words = run(
        tmp_path,
        *only("cpu"),
        "sft.learning_rate=1e30",
        "sft.muon_learning_rate=1e30",
        "sft.clip_grad_norm=1e30",
        "sft.warmup_steps=0",
    )
    assert code == 4, words[-2000:]
    assert "learning rate" in words


def test_a_hopeless_grpo_start_ends_with_3_and_the_figures(tmp_path: Path) -> None:
    code, _, words = run(
        tmp_path,
        *only("cpu"),
        'train.phases=["sft", "grpo"]',
        "sft.steps=2",
        "grpo.min_start_pass_at_16=0.9",
    )
    assert code == 3
    assert "GRPO was not started" in words and "pass@1" in words


def test_a_fallback_is_an_error_if_strict_else_a_warning_and_a_gate_not_reached_leaves_the_model(
    tmp_path: Path,
) -> None:
    """One run: strict, then as it is, then asked again. `strict` may change between attempts."""
    settings = [*only("cuda|cpu"), "sft.steps=2", "evaluate.min_pass_at_1=0.9"]
    code, _, words = run(tmp_path, *settings, "strict=true")
    assert code == 3
    assert "accelerator fallback" in words or "--strict" in words
    code, _, words = run(tmp_path, *settings)
    assert code == 3 and "min_pass_at_1 asks for 90.0%" in words
    assert (tmp_path / "tiny" / "model" / "model.safetensors").exists()
    told = of_kind(read_ledger(tmp_path / "tiny" / "ledger.jsonl"), Warned)
    assert any(one.what == "accelerator fallback" and one.attempt == 2 for one in told)
    assert "WARN accelerator fallback" in words
    assert "accelerator fallback" in (tmp_path / "tiny" / "report.html").read_text()
    assert run(tmp_path, *settings)[0] == 3, "asked again, the gate still says no"


@pytest.mark.slow
def test_a_transient_fault_goes_back_on_the_same_pool_and_changes_no_bit(tmp_path: Path) -> None:
    _, clean, _ = run(tmp_path / "a", *only("cpu"))
    code, data, _ = run(
        tmp_path / "b",
        "pools.ascend.accelerator=sim:transient?onset_step=6@cpu",
        "pools.nvidia.accelerator=cpu",
        "guard.checksum_every_steps=1",
    )
    assert code == 0
    assert data["final_weights_sha256"] == clean["final_weights_sha256"]
    fired = list((tmp_path / "b" / "tiny" / "ground_truth").glob("ascend-train.jsonl"))
    assert fired and fired[0].stat().st_size > 0
    assert [one["attribution"] for one in data["incidents"]] == ["transient chip fault"]
    assert read_ledger(tmp_path / "b" / "tiny" / "ledger.jsonl")


def test_completions_that_cannot_fit_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(ROOT / "runs" / "tiny.toml"), "--out", str(tmp_path)]
    words += ["--set", "grpo.max_completion_tokens=500"]
    assert main(words) == 2
    assert "grpo.max_completion_tokens=500" in capsys.readouterr().err
