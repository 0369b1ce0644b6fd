"""Checksums: silent on right products of every kind, loud on realistic corruption in any of the three products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bascule.guard.checksum import Checksums, _probe, parameter_names, product_ratio


class Corrupt(TorchDispatchMode):
    """A chip that spoils the n-th matrix product: what the fault catalogue does, reduced to one line."""

    def __init__(self, at: int, spoil: object) -> None:
        super().__init__()
        self.at, self.spoil, self.count = at, spoil, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        if func in (
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.bmm.default,
        ):
            if self.count == self.at:
                self.spoil(output)  # type: ignore[operator]
            self.count += 1
        return output


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 48, bias=False), nn.GELU(), nn.Linear(48, 8)
    )


def run(model: nn.Module, *, keep: bool = False) -> Checksums:
    torch.manual_seed(1)
    x = torch.randn(64, 24)
    with Checksums(names=parameter_names(model), keep=keep) as mode:
        model(x).square().mean().backward()
    return mode


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1)


SPOILS = {
    "one value zeroed": lambda x: flat(x)[flat(x).abs().argmax()].zero_(),
    "every fourth column zeroed": lambda x: x[..., ::4].zero_(),
    "sign flipped at a period": lambda x: flat(x)[3::7].neg_(),
    "exponent bit flipped": lambda x: flat(x)[5:6].view(torch.int32).bitwise_xor_(1 << 25),
    "all doubled": lambda x: x.mul_(2),
    "two columns swapped": lambda x: x.copy_(torch.cat([x[..., 1:2], x[..., 0:1], x[..., 2:]], -1)),
    "one NaN": lambda x: flat(x)[0:1].fill_(math.nan),
    "gain of one percent": lambda x: x.mul_(1.01),
    "rounded to bfloat16": lambda x: x.copy_(x.bfloat16().float()),
}


def test_a_clean_step_is_silent_and_every_product_was_checked() -> None:
    mode = run(network())
    assert mode.violations() == []
    assert (
        mode.products_seen == mode.products_checked == 8
    )  # 3 forward; 2 + 2 backward, the first layer's input needs none
    assert 0.0 < mode.worst_ratio() < 0.6


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
@pytest.mark.parametrize("at", range(8))
def test_every_kind_of_corruption_is_named_in_every_product(spoil: object, at: int) -> None:
    with Corrupt(at, spoil):
        mode = run(network())
    found = mode.violations()
    assert [violation.op_index for violation in found] == [at]


def test_the_violation_says_which_parameter_and_which_direction() -> None:
    wrong = []
    for at in range(8):
        with Corrupt(at, SPOILS["all doubled"]):
            wrong.append(run(network()).violations()[0])
    assert [(v.name, v.direction) for v in wrong[:3]] == [
        ("0.weight", "forward"),
        ("2.weight", "forward"),
        ("4.weight", "forward"),
    ]
    assert {(v.name, v.direction) for v in wrong[3:]} == {
        ("4.weight", "backward to the input"), ("4.weight", "backward to the weight"),
        ("2.weight", "backward to the input"), ("2.weight", "backward to the weight"),
        ("0.weight", "backward to the weight"),
    }  # fmt: skip
    assert wrong[0].shape == (64, 24, 48)
    assert "0.weight (forward, 64x24x48)" in str(wrong[0])


def test_a_nan_that_came_in_is_not_blamed_on_the_product() -> None:
    model = network()
    with Checksums() as mode:
        model(torch.full((4, 24), math.nan))
    assert mode.violations() == []


def test_batched_products_with_alpha_and_beta_are_checked() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b, c = (
        torch.randn(5, 7, 9, generator=generator),
        torch.randn(5, 9, 11, generator=generator),
        torch.randn(5, 7, 11, generator=generator),
    )
    with Checksums() as mode:
        torch.bmm(a, b)
        torch.baddbmm(c, a, b, beta=0.5, alpha=-2.0)
        torch.addmm(c[0, 0], a[0], b[0], beta=0.0, alpha=3.0)
    assert mode.products_checked == 3
    assert mode.violations() == []
    with Corrupt(0, lambda x: x[2, 3, 4:5].neg_()), Checksums() as mode:
        torch.bmm(a, b)
    assert len(mode.violations()) == 1


def test_an_addend_larger_than_the_product_is_rounded_too() -> None:
    """Regression: two strikes of 1.1 and 1.06 times the bound condemned a right chip whose last bits differ, inside Muon's
    beta A + alpha A A. The addend's rounding was taken from the sum with the probe, which can be 0 for a row that is not."""
    generator = torch.Generator().manual_seed(3)
    a, b = (1e-3 * torch.randn(4, 64, 64, generator=generator) for _ in range(2))
    addend = torch.randn(4, 64, 64, generator=generator, dtype=torch.float64)
    probe = _probe(64, torch.float64, addend.device)
    addend -= (addend @ probe).unsqueeze(-1) * probe / probe.square().sum()
    addend = addend.float()
    other_last_bits = (2 * torch.rand(4, 64, 64, generator=generator) - 1) * 2.0**-22
    right = torch.baddbmm(addend, a, b) * (1 + other_last_bits)
    assert product_ratio(a, b, right, addend) <= 0.5
    wrong = right.clone()
    wrong[2, 3, 4] *= 1.001
    assert product_ratio(a, b, wrong, addend) > 1


def test_rows_that_underflow_are_silent() -> None:
    a, b = (
        torch.full((3, 16), 1e-23),
        torch.randn(16, 8, generator=torch.Generator().manual_seed(3)),
    )
    assert float(product_ratio(a, b, a @ b)) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_silent_when_right_and_loud_when_zeroed(dtype: torch.dtype) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(64, 96, generator=generator).to(dtype)
        b = torch.randn(96, 48, generator=generator).to(dtype)
        right = (a.double() @ b.double()).to(dtype)
        assert float(product_ratio(a, b, right)) <= 1.0
        wrong = right.clone()
        wrong[:, ::3] = 0
        assert not float(product_ratio(a, b, wrong)) <= 1.0


def test_only_chosen_products_are_checked_under_a_budget() -> None:
    model = network()
    with Checksums(only=lambda index: index % 4 == 0) as mode:
        model(torch.randn(16, 24)).sum().backward()
    assert (mode.products_seen, mode.products_checked) == (8, 2)


def test_the_first_wrong_product_is_kept_with_all_that_reproduces_it() -> None:
    with Corrupt(4, SPOILS["every fourth column zeroed"]):
        kept = run(network(), keep=True).kept
    assert kept is not None and kept.violation.op_index == 4
    again = kept.left @ kept.right
    assert float(product_ratio(kept.left, kept.right, again)) <= 1.0
    assert not torch.allclose(again, kept.output)


def test_flips_of_high_bits_are_found_at_the_published_rate() -> None:
    """feasibility.md 6 found 99.95 % of single flips in bits 20 to 30; here 1,100 flips, at most 1 % may be missed."""
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(32, 96, generator=generator), torch.randn(96, 64, generator=generator)
    right, missed, total = a @ b, 0, 0
    for bit in range(20, 31):
        for place in torch.randint(0, right.numel(), (100,), generator=generator).tolist():
            wrong = right.clone()
            flat(wrong)[place : place + 1].view(torch.int32).bitwise_xor_(1 << bit)
            missed += float(product_ratio(a, b, wrong)) <= 1.0
            total += 1
    assert missed / total < 0.01
