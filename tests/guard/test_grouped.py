"""Checksums of grouped products: silent on right ones in all three directions, loud on a corrupt one, and no wait for the sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bascule.guard.checksum import Checksums, _probe
from bascule.guard.grouped import grouped_ratio
from tests.waits import Waits


class Spoil(TorchDispatchMode):
    """The chip's `at`-th grouped product is wrong."""

    def __init__(self, at: int, how: Any) -> None:
        super().__init__()
        self.at, self.how, self.count = at, how, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._grouped_mm.default:
            if self.count == self.at:
                self.how(output)
            self.count += 1
        return output


def one_value_is_doubled(x: torch.Tensor) -> None:
    x.view(-1)[x.abs().argmax()].mul_(2)


def a_column_is_zero(x: torch.Tensor) -> None:
    x[..., 3] = 0


def two_rows_are_exchanged(x: torch.Tensor) -> None:
    rows = x.view(-1, x.shape[-1])
    first, last = rows[0].clone(), rows[-1].clone()
    rows[0], rows[-1] = last, first


def run(dtype: torch.dtype = torch.bfloat16) -> Checksums:
    torch.manual_seed(0)
    rows = torch.randn(40, 16).to(dtype).requires_grad_()
    weights = torch.randn(5, 32, 16).to(dtype).requires_grad_()
    ends = torch.tensor([7, 7, 20, 39, 40], dtype=torch.int32)
    with Checksums() as mode:
        out = F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
        (out * torch.randn(40, 32).to(dtype)).sum().backward()
    return mode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_right_product_is_silent_forward_and_backward(dtype: torch.dtype) -> None:
    mode = run(dtype)
    assert mode.products_checked == mode.products_seen == 3
    assert mode.violations() == []
    assert mode.worst_ratio() < 0.7


@pytest.mark.parametrize("how", [one_value_is_doubled, a_column_is_zero, two_rows_are_exchanged])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_wrong_product_is_named(at: int, how: Any) -> None:
    with Spoil(at, how):
        mode = run()
    found = mode.violations()
    assert [one.op for one in found] == ["grouped_mm"]
    assert found[0].op_index == at


def test_the_check_asks_the_host_for_nothing() -> None:
    left, right = torch.randn(9, 4), torch.randn(2, 4, 6)
    ends = torch.tensor([5, 9])
    out = torch.cat([left[:5] @ right[0], left[5:] @ right[1]])
    with Waits() as waits:
        ratio = grouped_ratio(left, right, ends, out, _probe(6, torch.float32, left.device))
    assert not waits.seen and float(ratio) < 0.5
