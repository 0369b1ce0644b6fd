"""The supervisor's side: what it makes of a child that refuses, is cut off, or is not there; and reproducers that stand alone."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.errors import UsageError
from bascule.qualify import examine
from bascule.qualify.battery import HARNESS_PATIENCE, BatteryResult, _Run, run_battery
from bascule.qualify.check import asks
from bascule.qualify.judge import verdicts
from bascule.qualify.trace import transplant
from bascule.qualify.workload import Workload
from bascule.records import Evidence

TICK = ModelConfig(preset="tick")


@dataclass
class Asked:
    """One battery in a child, for the tests that look at it or go on from it (a child costs seconds of importing torch)."""

    folder: Path
    result: BatteryResult
    seen: list[str]
    begun: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("asked")
    seen: list[str] = []
    begun: list[tuple[str, int, int]] = []
    result = run_battery(
        "spare", "cpu", TICK, folder, time_limit_s=120, only=["exact.matmul", "soak.inference"],
        on_evidence=lambda item: seen.append(item.check), on_progress=lambda *where: begun.append(where),
    )  # fmt: skip
    return Asked(folder, result, seen, begun)


def test_answers_arrive_one_by_one_from_a_child(asked: Asked) -> None:
    assert asked.seen == ["exact.matmul", "exact.matmul", "soak.inference"]
    assert asked.begun[0] == ("exact.matmul[train]", 0, 3)
    assert asked.begun[-1] == ("soak.inference[infer]", 2, 3)
    result = asked.result
    assert (
        {item.pool for item in result.evidence}
        == {"spare"}
        == {verdict.pool for verdict in result.verdicts}
    )
    assert {verdict.verdict for verdict in result.verdicts} == {"unproven"}, (
        "a partial battery proves nothing"
    )
    assert result.examined.driver.startswith("torch")


def test_a_battery_writes_down_when_the_chip_computes(asked: Asked) -> None:
    lines = (asked.folder / "answers-1.jsonl").read_text(encoding="utf-8").splitlines()
    assert '{"busy": true}' in lines and '{"busy": false}' in lines


def test_a_chip_that_is_not_there_is_unproven_and_the_reason_is_kept(tmp_path: Path) -> None:
    result = run_battery("far", "npu", TICK, tmp_path, time_limit_s=120)
    assert {verdict.verdict for verdict in result.verdicts} == {"unproven"}
    assert {item.outcome for item in result.evidence} == {"skipped"}
    assert "npu" in result.evidence[0].detail


def test_an_accelerator_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sim:no-such-profile|no-such-profile"):
        run_battery("p", "sim:no-such-profile", TICK, tmp_path, time_limit_s=120)


def test_the_time_limit_leaves_the_rest_unproven(tmp_path: Path) -> None:
    result = run_battery("p", "cpu", TICK, tmp_path, time_limit_s=0.5)
    assert {verdict.verdict for verdict in result.verdicts} == {"unproven"}
    assert all("time limit of 0.5 s" in item.detail for item in result.evidence)


def test_a_supervisor_that_is_interrupted_leaves_no_child_behind(tmp_path: Path) -> None:
    def stop(*where: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_battery("p", "cpu", TICK, tmp_path, time_limit_s=120, on_progress=stop)
    request = str(tmp_path / "request-1.json")
    alive = [
        path for path in Path("/proc").glob("[0-9]*/cmdline") if request.encode() in _bytes(path)
    ]
    assert alive == []


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[Evidence]:
    only = ["numerics.forward", "numerics.backward", "exact.matmul"]
    evidence, _ = examine.qualify(
        open_accelerator("sim:gain-0.2-percent"),
        TICK,
        only=only,
        workdir=tmp_path_factory.mktemp("found"),
    )
    return [item for item in evidence if item.outcome == "fail"]


def script_of(item: Evidence) -> Path:
    return Path(item.reproduce.rpartition("python ")[2])


def test_every_finding_on_operators_leaves_a_script_without_bascule(
    findings: list[Evidence],
) -> None:
    assert {item.family for item in findings} == {"numerics", "exact"}
    for item in findings:
        text = script_of(item).read_text(encoding="utf-8")
        code = [line for line in text.splitlines() if line.startswith(("import", "from"))]
        assert not any("bascule" in line for line in code)
        assert len(text.splitlines()) < 80
        assert (script_of(item).parent / "environment.json").exists()


ALL_OF_THEM = """
import runpy, sys
sys.modules["bascule"] = None
for path in sys.argv[1:]:
    sys.argv = [path]
    print("#", path)
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
"""


def test_scripts_run_and_say_that_a_right_device_is_right(findings: list[Evidence]) -> None:
    """The planted fault acts only inside our session, so on the plain CPU every script must find nothing. They run in one process,
    which cannot import bascule."""
    items = {str(script_of(item)): item for item in findings}
    done = subprocess.run(
        [sys.executable, "-c", ALL_OF_THEM, *items], capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = dict(part.split("\n", 1) for part in done.stdout.split("# ")[1:])
    assert told.keys() == items.keys()
    for path, item in items.items():
        if item.family == "exact":
            assert "wrong" not in told[path]
        else:
            gain = float(told[path].splitlines()[0].split()[-1])
            assert abs(gain) < 1e-6 < abs(float(item.measured["gain"] or 0))


def test_a_copied_tensor_keeps_strides_offsets_and_overlaps() -> None:
    base = torch.arange(40.0)
    for tensor in (
        base.view(5, 8).t(),
        base[3:33].view(5, 6)[:, 1:4],
        base[:1].expand(7, 3),
        torch.zeros(0, 4),
    ):
        copied = transplant(tensor, torch.device("cpu"), torch.float64)
        assert copied.dtype == torch.float64 and copied.stride() == tensor.stride()
        assert torch.equal(copied.float(), tensor)


def test_the_trace_holds_forward_backward_optimizer_and_decode() -> None:
    trace = Workload(TICK, 0).trace
    names = {
        phase: {call.base_name for call in trace.of(phase)}
        for phase in ("forward", "backward", "optimizer", "inference")
    }
    assert {"mm", "scaled_dot_product_attention", "topk", "embedding"} <= names["forward"]
    assert {"embedding_dense_backward", "silu_backward"} <= names["backward"]
    assert {"baddbmm", "lerp_"} <= names["optimizer"]
    assert "_softmax" in names["inference"] and "silu_backward" not in names["inference"]


def test_two_workloads_of_one_seed_are_the_same_and_of_two_seeds_are_not() -> None:
    one, same, other = (Workload(TICK, seed).batch(3)["tokens"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_battery_that_was_cut_off_is_resumed_and_keeps_its_answers(
    asked: Asked, tmp_path: Path
) -> None:
    shutil.copytree(asked.folder, tmp_path, dirs_exist_ok=True)
    begun: list[str] = []
    again = run_battery(
        "spare", "cpu", TICK, tmp_path, time_limit_s=120, only=["exact"], resume=True,
        on_progress=lambda name, done, total: begun.append(f"{name} {done}/{total}"),
    )  # fmt: skip
    assert begun == ["exact.reduction[train] 2/4", "exact.reduction[infer] 3/4"]
    kept = [item.detail for item in asked.result.evidence if item.check == "exact.matmul"]
    assert [item.detail for item in again.evidence[:2]] == kept
    nothing_left = run_battery(
        "spare", "cpu", TICK, tmp_path, time_limit_s=120, only=["exact"], resume=True
    )
    assert nothing_left.examined == again.examined == asked.result.examined


@pytest.mark.slow
def test_findings_are_asked_first_and_one_that_is_gone_says_so(tmp_path: Path) -> None:
    run_battery("p", "cpu", TICK, tmp_path, time_limit_s=120, only=["exact"])
    answers = tmp_path / "answers-1.jsonl"
    answers.write_text(answers.read_text().replace('"check": "exact.reduction", "family": "exact", "roles": ["infer"], "outcome": "pass"',
                                                   '"check": "exact.reduction", "family": "exact", "roles": ["infer"], "outcome": "fail"'))  # fmt: skip
    begun: list[str] = []
    again = run_battery(
        "p",
        "cpu",
        TICK,
        tmp_path,
        time_limit_s=120,
        only=["exact"],
        on_progress=lambda name, done, total: begun.append(name),
    )
    assert begun[0] == "exact.reduction[infer]"
    assert again.evidence[0].outcome == "not again"
    assert again.evidence[0].detail.startswith("did not happen again: ")
    open_question = next(verdict for verdict in again.verdicts if verdict.role == "infer")
    assert any("did not happen again" in reason for reason in open_question.reasons)
    cleared = run_battery("p", "cpu", TICK, tmp_path, time_limit_s=120, only=["exact.reduction"])
    assert {item.outcome for item in cleared.evidence} == {"pass"}


def test_answers_for_another_seed_are_not_kept(asked: Asked, tmp_path: Path) -> None:
    shutil.copytree(asked.folder, tmp_path, dirs_exist_ok=True)
    begun: list[str] = []
    run_battery(
        "spare", "cpu", TICK, tmp_path, time_limit_s=120, only=["exact.matmul"], resume=True, seed=1,
        on_progress=lambda name, done, total: begun.append(name),
    )  # fmt: skip
    assert begun == ["exact.matmul[train]", "exact.matmul[infer]"]


def under_way(folder: Path, model: ModelConfig = TICK) -> _Run:
    """A battery whose child is at its first question."""
    run = _Run(
        pool="p", accelerator="cpu", model=model, folder=folder, deadline_s=time.monotonic() + 1e6, time_limit_s=1e6, quick=True,
        seed=0, dtype="fp32", threads=1, resume=False, ask_limit_s=None, on_evidence=None, on_progress=None,
        left=list(asks(quick=True, only=["coverage.forward"])),
    )  # fmt: skip
    run.opened, run.at, run.launches = True, run.left[0], 1
    return run


def test_silence_counts_against_the_chip_only_while_it_computes(tmp_path: Path) -> None:
    run = under_way(tmp_path)
    silent_since_s = time.monotonic() - 1.5 * run.left[0].check.limit_s
    assert run._overdue(silent_since_s) is None
    run._take({"busy": True})
    assert run._overdue(silent_since_s) == "hang"
    run._take({"busy": False})
    assert (
        run._overdue(time.monotonic() - 1.1 * HARNESS_PATIENCE * run.left[0].check.limit_s)
        == "slow"
    )


def test_our_own_slowness_leaves_the_role_unproven_and_the_battery_goes_on(tmp_path: Path) -> None:
    run = under_way(tmp_path)
    run._account("slow", -9)
    run.drop_lost_roles()
    assert [item.outcome for item in run.evidence] == ["skipped"] and len(run.left) == 1
    assert "not the chip" in run.evidence[0].detail
    assert verdicts(run.evidence, run.examined)[0].verdict == "unproven"


def test_limits_grow_with_the_model_and_not_without_end(tmp_path: Path) -> None:
    """With what is examined of it: of `mini` three layers, 33 M parameters; three layers of `v3` are 24 B."""
    runs = [under_way(tmp_path), *(under_way(tmp_path, ModelConfig(preset=preset)) for preset in ("mini", "v3"))]  # fmt: skip
    limits = [run._limit_s(run.left[0]) for run in runs]
    assert limits[0] == 60 and 180 < limits[1] < 240 and limits[2] == 1200


def test_a_disk_that_takes_no_more_ends_the_battery_without_a_word_against_the_chip(
    tmp_path: Path,
) -> None:
    """A limit on file sizes stands for the full disk: both are an OSError of the write."""
    small = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, small[1]))  # the child inherits it
    try:
        with pytest.raises(UsageError, match="could not write into .* says nothing about the chip"):
            run_battery("spare", "cpu", TICK, tmp_path, only=["resume.roundtrip"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, small)
    found = run_battery("spare", "cpu", TICK, tmp_path, only=["resume.roundtrip"], resume=True)
    assert {item.outcome for item in found.evidence} == {"pass"}
