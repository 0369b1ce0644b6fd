"""Mixed precision in training: decided once, learns as fp32 does, and stays the same run through resumes and a fallback."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from bascule.accelerators.base import Accelerator
from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.dispatch import OperatorMode
from bascule.errors import ChipCondemned, Preempted
from bascule.ledger import Ledger, of_kind
from bascule.records import TrainPrecision
from bascule.train import checkpoint, loop, precision
from bascule.train.state import TrainState
from bascule.train.step import NoJudge
from tests import guarded
from tests.train import steps

MODEL = ModelConfig(preset="tick")


class Untimed(CpuAccelerator):
    def timed(self, fn):  # type: ignore[no-untyped-def]
        raise AssertionError("a CPU was timed")


class Foreign(CpuAccelerator):
    """A chip that is no CPU, as far as the decision can tell."""

    def __init__(self) -> None:
        self.name, self.device = "npu", torch.device("meta")


def seconds(fp32: float, bf16: float | Exception):  # type: ignore[no-untyped-def]
    def told(which: str, accelerator: Accelerator, model: ModelConfig) -> float:
        if which == "bf16" and isinstance(bf16, Exception):
            raise bf16
        return {"fp32": fp32, "bf16": bf16}[which]  # type: ignore[return-value]

    return told


def test_what_is_asked_for_is_taken_and_a_cpu_is_never_timed() -> None:
    for asked in ("fp32", "bf16"):
        assert precision.decide(asked, Untimed(), MODEL).precision == asked
    auto = precision.decide("auto", Untimed(), MODEL)
    assert auto.precision == "fp32" and auto.reason == "a CPU trains first"


@pytest.mark.parametrize(
    ("fp32", "bf16", "taken", "why"),
    [
        (3.0, 2.0, "bf16", "1.50 times as fast"),
        (2.9, 2.0, "fp32", "1.45 times as fast"),
        (3.0, NotImplementedError("no bf16 here\nsecond line"), "fp32", "no bf16 here"),
    ],
)
def test_another_chip_is_asked_and_must_be_half_as_fast_again(
    fp32: float, bf16: float | Exception, taken: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_seconds", seconds(fp32, bf16))
    found = precision.decide("auto", Foreign(), MODEL)
    assert found.precision == taken and why in found.reason and "\n" not in found.reason


class Shapes(OperatorMode):
    """Of the first product's result, and its type."""

    def __init__(self) -> None:
        super().__init__()
        self.first: tuple[tuple[int, ...], torch.dtype] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "mm" and self.first is None:
            self.first = tuple(made.shape), made.dtype
        return made


@pytest.mark.parametrize(("ffn", "wide"), [("moe", 128), ("swiglu", 192)])
def test_the_probe_times_both_types_on_the_chip_itself_in_the_models_width(ffn, wide: int) -> None:  # type: ignore[no-untyped-def]
    model = ModelConfig(preset="tick", ffn=ffn, moe_intermediate_size=128)
    for which, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with Shapes() as shapes:
            assert precision._seconds(which, CpuAccelerator(), model) > 0.0
        assert shapes.first == ((precision.ROWS, wide), dtype)


def test_a_run_is_asked_once_and_a_snapshot_without_its_ledger_brings_its_own(
    tmp_path: Path,
) -> None:
    def must_not() -> TrainPrecision:
        raise AssertionError("asked again")

    ledger = Ledger(tmp_path / "one.jsonl", attempt=1)
    first = TrainPrecision(precision="bf16", reason="asked")
    assert precision.settle(ledger, None, lambda: first) == "bf16"
    assert precision.settle(ledger, None, must_not) == "bf16"
    assert len(of_kind(ledger.read(), TrainPrecision)) == 1 and precision.precision_of(ledger.read()) == "bf16"  # fmt: skip
    for extra, expected in (({"precision": "bf16"}, "bf16"), ({}, "fp32")):
        weight = {"w": torch.zeros(1)}
        path = checkpoint.save_snapshot(tmp_path / expected, 3, weight, {}, {}, extra, phase="sft")
        other = Ledger(tmp_path / f"{expected}.jsonl", attempt=1)
        assert precision.settle(other, path, must_not) == expected
        assert path.name in of_kind(other.read(), TrainPrecision)[0].reason
    assert precision.precision_of([]) == "fp32"


@pytest.mark.parametrize("phase", ["sft", "pretrain", "grpo"])
def test_gradients_and_weights_are_fp32_and_near_those_of_an_fp32_step(phase: str) -> None:
    found = {}
    for which in ("fp32", "bf16"):
        stepper = steps.stepper(CpuAccelerator())
        stepper.precision = which
        objective = steps.objectives(stepper)[phase]
        stepper.begin(objective)
        found[which] = stepper.propose(objective.next_batch(1))
        stepper.commit(found[which])
        assert {one.dtype for one in found[which].grads.values()} == {torch.float32}
        assert {one.dtype for one in stepper.kept().values() if one.is_floating_point()} == {torch.float32}  # fmt: skip
        assert {p.dtype for p in stepper.model.parameters()} == {torch.float32}
    wide, narrowed = found["fp32"], found["bf16"]
    assert wide.loss != narrowed.loss and abs(wide.loss - narrowed.loss) < 0.02 * abs(wide.loss) + 0.02  # fmt: skip
    assert abs(wide.grad_norm / narrowed.grad_norm - 1.0) < 0.3


def test_the_old_policy_is_scored_as_the_step_computes_it() -> None:
    """So the first minibatch's policy ratio is exactly 1 in bf16 too."""
    stepper = steps.stepper(CpuAccelerator())
    stepper.precision = "bf16"
    objective = steps.objectives(stepper)["grpo"]
    stepper.begin(objective)
    assert stepper.propose(objective.next_batch(1)).metrics["max_policy_ratio"] == 1.0


def test_a_small_model_learns_in_bf16_as_in_fp32(tmp_path: Path) -> None:
    lost = {}
    for which in ("fp32", "bf16"):
        rig = guarded.rig(tmp_path / which, precision=which)
        rig.stepper.begin(rig.objective)
        losses = []
        for step in range(1, 21):
            proposal = rig.stepper.recompute(rig.objective.next_batch(step))
            rig.stepper.commit(proposal)
            losses.append(proposal.loss)
        lost[which] = sum(losses) / len(losses)
        assert losses[-1] < 0.1 * losses[0]
    assert abs(lost["bf16"] / lost["fp32"] - 1.0) < 0.05


def weights_of(stepper) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    return {name: one.detach().clone() for name, one in stepper.model_state().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_bf16_run_that_is_cut_off_twice_ends_in_the_bits_of_one_that_was_not(
    tiny, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    def launch(folder: Path, start: int | None, stop_after: int) -> dict[str, torch.Tensor]:
        made, state = tiny(max_tokens=20), TrainState()
        made.stepper.precision = "bf16"
        plan = made.plan(folder, every=1)
        if start is not None:
            path = checkpoint.path_of(folder, start)
            state, _ = loop.resume(made.stepper, made.objectives, path, state)
        hooks = loop.Hooks(should_stop=lambda: made.stepper.step >= stop_after)
        with contextlib.suppress(Preempted):  # where it is to stop early
            loop.run(made.stepper, made.objectives, NoJudge(), state, plan, hooks)
        assert made.stepper.step in (stop_after, 7)
        return weights_of(made.stepper)

    whole = launch(tmp_path / "whole", None, 99)
    launch(tmp_path / "cut", None, 2)
    launch(tmp_path / "cut", 2, 5)
    assert equal(launch(tmp_path / "cut", 5, 99), whole)
    saved = checkpoint.load(checkpoint.path_of(tmp_path / "cut", 7)).model
    assert {one.dtype for one in saved.values() if one.is_floating_point()} == {torch.float32}


def test_a_bf16_run_that_leaves_a_condemned_chip_ends_in_the_bits_of_one_that_met_none(tmp_path: Path) -> None:  # fmt: skip
    undisturbed = guarded.rig(tmp_path / "whole", precision="bf16")
    undisturbed.run(12, every=2)
    left = guarded.rig(tmp_path / "left", "sim:backward-wrong?onset_step=8@cpu", precision="bf16")
    with pytest.raises(ChipCondemned):
        left.run(12, every=2)
    assert 0 < max(left.certified) < 12 and not undisturbed.alarms
    on = guarded.rig(tmp_path / "left", precision="bf16")
    on.run(12, every=2)
    assert equal(weights_of(on.stepper), weights_of(undisturbed.stepper))
