"""A finding is traced to the operator that carries it, made small, and handed over as a script that prints the same figure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bascule.accelerators.base import Work
from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.qualify import examine, pinpoint
from bascule.qualify.check import CHECKS, Ask
from bascule.qualify.checks import coverage, generation
from bascule.qualify.checks.speed import datasheet
from bascule.qualify.context import CheckContext
from bascule.qualify.workload import Workload

TICK = ModelConfig(preset="tick")


def context_on(
    name: str, folder: Path, check: str, dtype: torch.dtype = torch.float32
) -> CheckContext:
    accelerator = open_accelerator(name)
    accelerator.prepare(1)
    context = CheckContext(
        accelerator, open_accelerator("cpu"), TICK, True, 0, folder, Workload(TICK, 0, dtype)
    )
    found = next(one for one in CHECKS if one.name == check)
    return context.asked(Ask(found, found.roles[0]))


def test_a_wrong_layer_is_traced_to_its_smallest_wrong_operator_and_the_script_prints_the_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_on("sim:gain-0.2-percent", tmp_path, "numerics.layers")
    (found,) = examine.put(context, context._asked)
    assert found.outcome == "fail" and "carried by aten::" in found.detail
    script = Path(found.reproduce.rpartition("python ")[2])
    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60 and (script.parent / "inputs.safetensors").exists()
    here = context.accelerator

    def on_the_chip(answer: Any) -> Any:
        with here.session(Work("train", 1)):
            return answer("cpu", False)

    source = source.replace("parser.parse_args()", "parser.parse_args([])")
    played = source.replace("got, want = answer(name, False)", "got, want = on_the_chip(answer)")
    exec(
        compile(played, str(script), "exec"), {"__file__": str(script), "on_the_chip": on_the_chip}
    )
    gain = float(re.search(r"signed gain (\S+)", capsys.readouterr().out)[1])  # type: ignore[index]
    said = float(re.search(r"alone: signed gain (\S+)", found.detail)[1])  # type: ignore[index]
    assert gain == pytest.approx(said, rel=0.01)


def test_calls_that_differ_between_equal_runs_are_found_and_a_right_chip_has_none(
    tmp_path: Path,
) -> None:
    x = torch.ones(64, 64)
    right, jumpy = (
        context_on(name, tmp_path, "determinism.training") for name in ("cpu", "sim:jitter")
    )
    assert pinpoint.unsteady_call(jumpy, lambda: (x @ x) @ x) is not None
    assert pinpoint.unsteady_call(right, lambda: (x @ x) @ x) is None
    assert pinpoint.wrong_call(right, lambda: x @ x) is None


def test_an_engine_that_keeps_its_old_weights_is_called_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_on("cpu", tmp_path, "generation.weights")
    assert generation.weights(context)[0].outcome == "pass"
    make = generation._engine

    def deaf(*args: Any) -> Any:
        engine = make(*args)
        monkeypatch.setattr(engine.model, "load_state_dict", lambda state: None)
        return engine

    monkeypatch.setattr(generation, "_engine", deaf)
    found = generation.weights(context)[0]
    assert found.outcome == "fail" and found.detail.startswith("stale weights")


def test_the_sign_test_is_two_sided_and_exact() -> None:
    assert generation.two_sided_sign_test(0, 0) == generation.two_sided_sign_test(3, 3) == 1.0
    assert (
        generation.two_sided_sign_test(0, 11) == generation.two_sided_sign_test(11, 0) == 2 / 2**11
    )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_half_types_raise_no_false_alarm_on_the_clean_cpu(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    only = ("numerics.layers", "numerics.gradients", "generation")
    evidence, _ = examine.qualify(
        open_accelerator("cpu"), TICK, dtype=dtype, only=only, workdir=tmp_path
    )
    assert [item.detail for item in evidence if item.outcome != "pass"] == []


def test_an_operator_without_a_kernel_for_the_device_is_told_apart() -> None:
    assert coverage.has_own_kernel(torch.ops.aten.mm.default, "cpu")
    assert not coverage.has_own_kernel(torch.ops.aten.mm.default, "npu")


def test_a_drivers_name_finds_its_datasheet() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "Ascend910B3", "AMD EPYC 7B13")
    rows = [datasheet(name) for name in names]
    assert [row and row.name for row in rows] == ["H100 SXM", "H200 SXM", "Ascend 910B", None]
