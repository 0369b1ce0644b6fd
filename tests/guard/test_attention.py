"""The laws of fused attention: kept by a right kernel at any scale, broken by each wrong one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bascule.guard.attention import FUSED
from bascule.guard.checksum import Checksums


class Spoil(TorchDispatchMode):
    """Changes one result of the fused operator, forward or backward, every time it runs (`once`: only the first time)."""

    def __init__(self, backward: bool, which: int, change, *, once: bool = False) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.backward, self.which, self.change, self.once = backward, which, change, once

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        outputs = func(*args, **(kwargs or {}))
        if func in FUSED and FUSED[func].backward == self.backward and self.change is not None:
            self.change(outputs[self.which])
            if self.once:
                self.change = None
        return outputs


def checked(
    seed: int = 0, size: float = 1.0, tokens: int = 33, dtype: torch.dtype = torch.float32
) -> Checksums:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        (size * torch.randn(2, 4, tokens, 16, generator=generator)).to(dtype).requires_grad_()
        for _ in range(3)
    )
    with Checksums() as mode:
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        output.backward((1e-4 * torch.randn(output.shape, generator=generator)).to(dtype))
    return mode


@pytest.mark.parametrize("size", [0.01, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_right_kernel_keeps_the_laws(size: float, seed: int) -> None:
    mode = checked(seed, size, tokens=[7, 33, 64, 100, 128][seed])
    assert mode.products_checked == 2 and mode.violations() == [] and mode.worst_ratio() < 0.6


def gain(factor: float):  # type: ignore[no-untyped-def]
    return lambda x: x.mul_(factor)


CHANGES = {
    "rows sum to 0.99": gain(0.99),
    "0.2 percent too large": gain(1.002),
    "every fourth value zeroed": lambda x: x[..., ::4].zero_(),
    "one row negated": lambda x: x[1, 2, 5].neg_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_wrong_forward_is_seen_even_if_it_is_wrong_every_time(change: object) -> None:
    with Spoil(False, 0, change):
        found = checked().violations()
    assert found and (found[0].op, found[0].direction) == ("attention", "forward")


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["dq", "dk", "dv"])
def test_a_wrong_gradient_is_seen(which: int, name: str) -> None:
    """All but 0.2 percent in dq or dk: their law adds up scores of either sign and resolves about one percent."""
    if which < 2 and name == "0.2 percent too large":
        return
    with Spoil(True, which, CHANGES[name]):
        found = checked().violations()
    assert [(v.op, v.direction) for v in found] == [("attention", "backward")]


def test_a_forward_that_was_wrong_once_is_seen() -> None:
    with Spoil(False, 0, lambda x: x[0, 1, 7, 3:4].neg_(), once=True):
        assert len(checked().violations()) == 1


def test_dropout_has_no_such_laws_and_is_passed_over() -> None:
    q = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    with Checksums() as mode:
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert mode.violations() == []


def test_half_precision_attention_is_silent_when_right() -> None:
    for seed in range(5):
        assert checked(seed, dtype=torch.bfloat16).violations() == []
