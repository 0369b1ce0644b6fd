"""A run's own ledger replaces the datasheet: rates of its chips, and how long its fallbacks took."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.errors import RecipeError
from bascule.folder import RunFolder
from bascule.ledger import Ledger
from bascule.plan.answer import answer
from bascule.plan.catalogue import find_chip
from bascule.plan.measured import chips_of, pools_of, read_run, recovery_of
from bascule.records import Evidence, Incident, Migration, StepStats


def run_of(folder: Path, *, gemm: float, lost: tuple[float, ...] = ()) -> Path:
    """A run whose pool `lab` is an H100 with the given matrix rate (GFLOP/s)."""
    place = RunFolder(folder)
    place.create()
    ledger = Ledger(place.ledger)
    seen = {"gemm_gflops": gemm, "copy_gb_per_s": 3000.0, "attention_gflops": 3e5, "step_gflops": 2e5, "datasheet_chip": "H100 SXM"}  # fmt: skip
    ledger.append(
        Evidence(check="speed.step", family="speed", roles=("train",), outcome="pass", measured=seen, bound="", pool="lab")
    )  # fmt: skip
    for seconds in lost:
        ledger.append(
            Migration(from_pool="lab", to_pool="cpu", failed_at_step=9, resumed_from_step=5, steps_recomputed=4, seconds_lost=seconds, snapshot="s")
        )  # fmt: skip
    return folder


def test_a_runs_pools_are_chips_with_measured_figures(tmp_path: Path) -> None:
    records = read_run(run_of(tmp_path / "run", gemm=5e5))
    chip = chips_of(records)["lab"]
    assert chip.basis == "measured on this machine" and chip.gemm_bf16_tflops == pytest.approx(500)
    assert (
        chip.memory_tbs == pytest.approx(3.0) and chip.bf16_tflops == find_chip("H100").bf16_tflops
    )
    assert pools_of(records)["lab"]["step_flops_per_s"] == pytest.approx(2e14)


def test_a_slower_chip_takes_longer_and_the_runs_fallbacks_say_how_long_recovery_takes(
    tmp_path: Path,
) -> None:
    words = "64 x lab, 1T tokens, bf16"
    slow, fast = (
        answer("llama-3.1-8b", train=[words], chip_file=run_of(tmp_path / str(gemm), gemm=gemm, lost=(40.0, 60.0))).trainings[0]
        for gemm in (3e5, 8e5)
    )  # fmt: skip
    assert slow.step.seconds > 1.1 * fast.step.seconds
    assert "measured on this machine" in slow.step.basis
    assert recovery_of(read_run(tmp_path / "300000.0")).restart_s == 50.0
    assert slow.ask.recovery.down_s == 50.0


def test_detection_is_the_time_from_the_last_good_step_to_the_incident(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", gemm=5e5, lost=(40.0,))
    ledger = Ledger(RunFolder(folder).ledger)
    ledger.append(
        StepStats(
            time_s=100.0,
            step=8,
            phase="sft",
            loss=1.0,
            grad_norm=1.0,
            learning_rate=1e-3,
            tokens=8,
            seconds=1.0,
        )
    )
    ledger.append(
        Incident(time_s=107.0, incident_id="1", step=9, sentinel="watchdog", attribution="persistent chip fault", action="condemn", evidence="e", rollback=True)
    )  # fmt: skip
    assert recovery_of(read_run(folder)).detect_s == pytest.approx(7.0)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="without a ledger"):
        answer("llama-3.1-8b", train=["64 x lab, 1T tokens"], chip_file=tmp_path)
