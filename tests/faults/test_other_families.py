"""Memory, timing, runtime, storage and collective faults: each seen from the outside, as a job would see it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bascule.accelerators.base import Work
from bascule.accelerators.registry import open_accelerator
from bascule.errors import OperatorMissing
from bascule.faults.catalogue import FaultSpec
from bascule.faults.fault import Call
from bascule.faults.storage import damage
from bascule.model import kernels  # noqa: F401  (registers the operators)

ONES = torch.ones(32, 32)

CHILD = """
import sys, torch
from pathlib import Path
from bascule.accelerators.base import Work
from bascule.accelerators.registry import open_accelerator
chip = open_accelerator(sys.argv[1], fault_log=Path(sys.argv[2]))
for step in range(8, 13):
    with chip.session(Work("train", step)):
        torch.ones(32, 32) @ torch.ones(32, 32)
    print(step, flush=True)
"""


def child(name: str, log: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, name, str(log)], stdout=subprocess.PIPE, text=True
    )


def test_a_process_dies_by_sigkill_at_its_step_and_the_log_was_written_before(
    tmp_path: Path,
) -> None:
    process = child("sim:dies", tmp_path / "log")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert out.split() == ["8", "9"]
    assert json.loads((tmp_path / "log").read_text())["fault"] == "process_death"


def test_a_hang_stops_progress_at_its_step_and_the_process_lives_on(tmp_path: Path) -> None:
    process = child("sim:hang", tmp_path / "log")
    assert [process.stdout.readline().strip() for _ in range(2)] == ["8", "9"]
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_a_hang_of_some_seconds_ends() -> None:
    start = time.perf_counter()
    with open_accelerator("sim:hang?amount=0.2&onset_step=1").session(Work("train", 1)):
        ONES @ ONES
    assert 0.2 <= time.perf_counter() - start < 2


def test_a_missing_operator_is_named_with_its_pass() -> None:
    with (
        pytest.raises(OperatorMissing, match="aten::silu is not implemented.*forward"),
        open_accelerator("sim:missing-op").session(Work("infer", 1)),
    ):
        torch.nn.functional.silu(ONES)


def test_a_missing_backward_operator_leaves_inference_alone() -> None:
    chip, x = open_accelerator("sim:missing-backward-op"), ONES.clone().requires_grad_()
    with chip.session(Work("infer", 1)):
        y = torch.nn.functional.silu(x)
    with (
        pytest.raises(OperatorMissing, match="silu_backward.*backward"),
        chip.session(Work("train", 1)),
    ):
        y.sum().backward()


def test_a_device_error_is_torchs_own_kind() -> None:
    with (
        pytest.raises(torch.AcceleratorError, match="507015"),
        open_accelerator("sim:device-error").session(Work("train", 10)),
    ):
        ONES @ ONES


def test_out_of_memory_strikes_large_results_only() -> None:
    chip = open_accelerator("sim:oom")
    with chip.session(Work("train", 1)):
        ONES @ ONES
    with (
        pytest.raises(torch.OutOfMemoryError, match="tried to allocate 262144 bytes"),
        chip.session(Work("train", 1)),
    ):
        torch.ones(256, 256) * 2


def test_a_leak_holds_memory_until_the_chip_is_full() -> None:
    chip = open_accelerator("sim:leak?amount=1000")
    with pytest.raises(torch.OutOfMemoryError, match="32000 bytes were never given back"):
        for step in range(1, 40):
            with chip.session(Work("train", step)):
                pass
    assert step == 33


def test_bit_rot_changes_a_weight_for_good_and_autograd_does_not_notice() -> None:
    linear = torch.nn.Linear(32, 32, bias=False)
    before = linear.weight.detach().clone()
    with open_accelerator("sim:bit-rot?rate=1").session(Work("train", 1)):
        linear(ONES).sum().backward()
    changed = (linear.weight != before).sum()
    assert int(changed) == 1


def test_a_slow_session_takes_its_multiple() -> None:
    start = time.perf_counter()
    with open_accelerator("sim:slow").session(Work("train", 1)):
        time.sleep(0.05)
    assert 0.145 <= time.perf_counter() - start < 1


def test_host_fallback_warns_and_loses_time_but_computes_right() -> None:
    with (
        pytest.warns(UserWarning, match="falls back to run on the CPU"),
        open_accelerator("sim:host-fallback").session(Work("infer", 1)),
    ):
        rows = torch.softmax(ONES, -1)
    assert torch.equal(rows, torch.softmax(ONES, -1))


@pytest.mark.parametrize("kind", ["torn_write", "flipped_write", "lost_write"])
def test_a_damaged_file_differs_and_the_same_seed_damages_it_alike(
    tmp_path: Path, kind: str
) -> None:
    content, results = bytes(range(256)) * 16, []
    for name in ("a", "b"):
        path = tmp_path / name
        path.write_bytes(content)
        assert damage(FaultSpec(kind=kind, onset_step=5), path, step=4) is None
        assert path.read_bytes() == content
        touched = damage(FaultSpec(kind=kind, onset_step=5), path, step=5, seed=3)
        assert touched is not None and touched.count > 0
        results.append(path.read_bytes())
    assert results[0] == results[1] != content
    assert (len(results[0]) == len(content)) == (kind != "torn_write")


@pytest.fixture
def alone(tmp_path: Path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("wrong_sum", lambda x: int((x == 0).sum()) == 17),
        ("double_sum", lambda x: bool((x == 2).all())),
        ("lost_tail", lambda x: x[-9:].tolist() == [1.0] + [0.0] * 8),
    ],
)
def test_a_collective_brings_back_the_wrong_sum(alone: None, kind: str, wrong) -> None:
    chip = open_accelerator(f"sim:wrong-all-reduce?kind={kind}")
    for again in (False, True):
        values = torch.ones(1024)
        with chip.session(Work("train", 1)):
            handle = dist.all_reduce(values, async_op=again)
            if again:
                handle.wait()
        assert wrong(values)
    values = torch.ones(1024)
    dist.all_reduce(values)
    assert bool((values == 1).all())


def test_an_operator_is_named_with_its_library() -> None:
    ours, theirs = torch.ops.bascule.attention.default, torch.ops.aten.silu.default
    assert Call("attention", ours, (), {}, "forward").name == "bascule::attention"
    assert Call("silu", theirs, (), {}, "forward").name == "aten::silu"
