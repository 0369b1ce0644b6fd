"""The Ascend path under a stand-in private-use device named `npu`, in processes of its own: PyTorch takes one such name for good."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bascule.config.model import ModelConfig
from bascule.qualify.battery import BatteryResult, run_battery

HERE = Path(__file__).parent
MODEL = ModelConfig(preset="tick")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        shutil.which("c++") is None or shutil.which("ninja") is None,
        reason="needs a C++ compiler and ninja",
    ),
]


@pytest.fixture(scope="session")
def path(pytestconfig: pytest.Config) -> str:
    """PYTHONPATH with which PyTorch finds the stand-in; compiled once, kept in pytest's cache."""
    cache = pytestconfig.cache
    build = cache.mkdir("standin_npu") if cache else HERE / "build"
    subprocess.run([sys.executable, str(HERE / "torch_npu.py"), str(build)], check=True)
    return os.pathsep.join([str(HERE), str(build), str(HERE.parents[1])])


@pytest.fixture
def npu(path: str, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every process that is started from here on has the stand-in."""
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    return monkeypatch


def started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=380)
    assert process.returncode == 0, out[-4000:] + err[-2000:]
    return out


def trained_by_two(folder: Path) -> list[dict[str, float]]:
    ranks = [started(str(HERE / "ranks.py"), str(rank), str(folder)) for rank in range(2)]
    return [json.loads(said(rank)) for rank in ranks]


def examined(folder: Path, *checks: str) -> BatteryResult:
    """Run in processes of their own, so that the stand-in need not be in this one."""
    return run_battery("npu", "npu", MODEL, folder, time_limit_s=300, only=checks)


def unfit_for(result: BatteryResult) -> set[str]:
    return {verdict.role for verdict in result.verdicts if verdict.verdict == "unfit"}


def test_the_behaviour_suite_and_the_model_pass_on_a_foreign_device(npu: Any) -> None:
    suites = [str(HERE / "on_npu.py"), str(HERE.parent / "accelerators" / "test_contract.py")]
    told = said(started("-m", "pytest", *suites, "-k", "npu", "-p", "no:cacheprovider"))
    passed = re.search(r"(\d+) passed", told)
    assert passed and int(passed[1]) >= 42 and "skipped" not in told, told[-2000:]


def test_ddp_fsdp2_and_sharded_checkpoints_over_hccl_end_with_the_plain_runs_bits(
    npu: Any, tmp_path: Path
) -> None:
    assert trained_by_two(tmp_path) == 2 * [{"ddp": 0.0, "fsdp2": 0.0, "checkpoint": 0.0}]


def test_a_value_lost_by_one_collective_spoils_what_uses_it_and_nothing_else(
    npu: Any, tmp_path: Path
) -> None:
    npu.setenv("STANDIN_NPU_FAULTS", "zero:reduce_scatter")
    for rank in trained_by_two(tmp_path):
        assert rank["ddp"] == 0 and rank["fsdp2"] == rank["checkpoint"] > 1e-3


def test_doctor_opens_it_and_names_what_a_real_one_would_still_need(npu: Any) -> None:
    told = said(started("-m", "bascule.cli", "doctor"))
    assert re.search(r"npu +yes: Huawei stand-in", told) and "/dev/davinci" in told


def test_qualify_finds_nothing_wrong_with_a_sound_one(npu: Any, tmp_path: Path) -> None:
    result = examined(tmp_path, "coverage", "numerics.forward", "links", "resume")
    assert {item.outcome for item in result.evidence} == {"pass"}, result.evidence
    assert "all on the chip" in result.evidence[0].detail and not unfit_for(result)


@pytest.mark.parametrize(
    ("fault", "unfit"),
    [
        ("missing:aten::silu", {"train", "infer"}),
        ("missing:aten::silu_backward", {"train"}),
        ("dead:aten::silu", {"train", "infer"}),
        ("zero:aten::mm", {"train", "infer"}),
        ("nan:aten::silu_backward", {"train"}),
        ("host:aten::silu", set()),
        ("quiet:aten::silu", set()),
    ],
)
def test_qualify_judges_each_role_by_what_it_calls(
    fault: str, unfit: set[str], npu: Any, tmp_path: Path
) -> None:
    npu.setenv("STANDIN_NPU_FAULTS", fault)
    result = examined(tmp_path, "coverage", "numerics.forward", "numerics.backward")
    kind, operator = fault.split(":", 1)
    told = " ".join(item.detail for item in result.evidence if item.family == "coverage")
    assert unfit_for(result) == unfit, result.evidence
    assert (f"{operator} missing" in told) == (kind == "missing"), told
    assert (f"on the host: {operator}" in told) == (kind in ("host", "quiet")), told


def test_a_link_that_loses_a_value_condemns_training_alone(npu: Any, tmp_path: Path) -> None:
    npu.setenv("STANDIN_NPU_FAULTS", "zero:allreduce")
    result = examined(tmp_path, "links")
    assert unfit_for(result) == {"train"} and "sum over all ranks" in result.evidence[0].detail
