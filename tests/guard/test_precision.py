"""The guard of a bf16 run: two right chips that round at other places are no fault of either, and a wrong one is still seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bascule.accelerators.base import Work
from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.trust import GuardConfig
from bascule.dispatch import OperatorMode
from bascule.errors import ChipCondemned
from bascule.guard import audit, noise
from bascule.guard.noise import NoiseFloor
from bascule.guard.replay import again
from bascule.model import kernels
from tests import guarded

REFEREE = CpuAccelerator("referee")
CLOSE = GuardConfig(checksum_every_steps=1, audit_every_steps=1, rule_out_rate=0.05, certify_sequences=0)  # fmt: skip
aten = torch.ops.aten


class OtherSums(OperatorMode):
    """bf16 products in other orders of an fp32 sum rounded once: all of it, or in two halves. `rounded`: the halves are bf16 themselves,
    which is less exact than a right chip (checksums may say so)."""

    def __init__(self, halves: bool, rounded: bool = False) -> None:
        super().__init__()
        self.halves, self.rounded = halves, rounded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (aten.mm.default, aten.bmm.default) or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        a, b = args if self.rounded else (one.float() for one in args)
        half = a.shape[-1] // 2
        if self.halves and half:
            first = func(a[..., :half], b[..., :half, :])
            return (first + func(a[..., half:], b[..., half:, :])).bfloat16()
        return func(a, b).bfloat16()


class OtherKernels(CpuAccelerator):
    """A right chip of another make: other sums, attention in pieces, PyTorch's norms."""

    def __init__(self, halves: bool, rounded: bool = False) -> None:
        super().__init__("other")
        self.how = halves, rounded

    @contextmanager
    def session(self, work: Work) -> Iterator[None]:
        with kernels.plain(), sdpa_kernel(SDPBackend.MATH), OtherSums(*self.how):
            yield


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("ffn", ["swiglu", "moe"])
def test_a_right_chip_with_other_kernels_raises_no_alarm(ffn: Any, halves: bool, tmp_path: Path) -> None:  # fmt: skip
    """Every product under its checksum, a part audited and the update rehearsed at every step, every second step replayed whole."""
    rig = guarded.rig(tmp_path, OtherKernels(halves), config=CLOSE, ffn=ffn, precision="bf16")
    rig.run(5, every=2)
    assert not rig.alarms and rig.certified[:2] == [0, 2]
    first = rig.objective.next_batch(1)
    mine, right = rig.stepper.recompute(first), rig.stepper.recompute(first, REFEREE)
    assert any(not torch.equal(g, right.grads[n]) for n, g in mine.grads.items())


@pytest.mark.parametrize("ffn", ["swiglu", "moe"])
def test_whole_steps_of_a_chip_that_rounds_more_often_stay_within_the_floor(ffn: Any, tmp_path: Path) -> None:  # fmt: skip
    rig = guarded.rig(tmp_path, ffn=ffn, precision="bf16")
    rig.stepper.begin(rig.objective)
    for step in (1, 2, 3):
        right = rig.stepper.recompute(rig.objective.next_batch(step), REFEREE)
        other = rig.stepper.recompute(right.batch, OtherKernels(True, rounded=True))
        found = NoiseFloor(REFEREE).compare(other, right, rig.stepper)
        assert found.agrees and found.error > 0.0, found
        rig.stepper.commit(right)


def test_a_floor_measured_in_fp32s_unit_would_condemn_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    rig = guarded.rig(tmp_path, OtherKernels(False), ffn="swiglu", precision="bf16")
    rig.stepper.begin(rig.objective)
    batch = rig.objective.next_batch(1)
    mine, right = rig.stepper.recompute(batch), rig.stepper.recompute(batch, REFEREE)
    assert NoiseFloor(REFEREE).compare(mine, right, rig.stepper).agrees
    monkeypatch.setattr(noise, "DTYPE", {"bf16": torch.float32})
    assert not NoiseFloor(REFEREE).compare(mine, right, rig.stepper).agrees


@pytest.mark.parametrize("fault", ["backward-wrong:low", "doubled-gradient", "zeroed", "attention-backward"])  # fmt: skip
def test_a_planted_fault_is_seen(fault: str, tmp_path: Path) -> None:
    rig = guarded.rig(tmp_path, f"sim:{fault}@cpu", config=CLOSE, precision="bf16")
    with pytest.raises(ChipCondemned):
        rig.run(12, every=4)
    assert rig.incidents[0].attribution == "persistent chip fault"


def test_a_wrong_product_goes_by_the_name_of_the_parameter_that_it_read_a_copy_of(tmp_path: Path) -> None:  # fmt: skip
    rig = guarded.rig(tmp_path, "sim:zeroed?rate=1.0@cpu", precision="bf16")
    rig.stepper.begin(rig.objective)
    found = again(rig.stepper, rig.objective.next_batch(1), 0).violations
    named = {one.direction for one in found if one.name}
    assert {"forward", "backward to the input", "backward to the weight"} <= named
    names = dict(rig.stepper.model.named_parameters())
    for one in found:
        if one.direction == "forward" and one.name and names[one.name].dim() == 2:
            assert one.shape[1:] == tuple(reversed(names[one.name].shape)), one


@pytest.mark.parametrize("name", ["model.layers.1", "model.norm", "model.embed_tokens"])
def test_an_audited_part_is_computed_again_in_the_type_it_was_captured_in(name: str, tmp_path: Path) -> None:  # fmt: skip
    rig = guarded.rig(tmp_path, precision="bf16")
    rig.stepper.begin(rig.objective)
    part = next(one for one in audit.parts(rig.stepper.model) if one.name == name)
    with audit.capturing(part, 1) as capture:
        proposal = rig.stepper.recompute(rig.objective.next_batch(1))
    found = audit.judge(capture, proposal.grads, REFEREE)
    assert capture.precision == "bf16" and found is not None and found.bit_equal
    assert audit._products(capture) == ("bf16" if name == "model.layers.1" else "fp32")
