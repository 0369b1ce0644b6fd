"""The statistics must see what published tooling passes (guard.md 6.1), and stay silent on right results."""

from __future__ import annotations

import math

import pytest
import torch

from bascule import numerics


def product(dtype: torch.dtype, seed: int = 0, k: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """(right result in `dtype`, float64 reference) of a matmul whose inputs are exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(128, k, generator=generator).to(dtype)
    b = torch.randn(k, 128, generator=generator).to(dtype)
    reference = a.double() @ b.double()
    return (a.float() @ b.float()).to(dtype), reference


def judged(
    measured: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, k: int = 256
) -> str | None:
    floor = numerics.rounding_floor(reference, dtype, accumulate_terms=k)
    return numerics.verdict(numerics.compare(measured, reference), floor, dtype)


def truncate_to_bf16(x: torch.Tensor) -> torch.Tensor:
    return (x.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_a_right_product_passes_in_every_dtype(dtype: torch.dtype, seed: int) -> None:
    if dtype == torch.float64:
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(64, 64, generator=generator, dtype=dtype)
        b = torch.randn(64, 64, generator=generator, dtype=dtype)
        reference = a @ b
        other_order = (a[:, 32:] @ b[32:]) + (a[:, :32] @ b[:32])
        assert judged(other_order, reference, dtype, 64) is None
        return
    right, reference = product(dtype, seed)
    assert judged(right, reference, dtype) is None


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-30])
@pytest.mark.parametrize(
    ("mutant", "why"),
    [
        (lambda x: x * 2, "gain"),
        (lambda x: x * 0, "gain"),
        (lambda x: -x, "gain"),
        (lambda x: x * 1.002, "gain"),
        (truncate_to_bf16, "gain"),
    ],
    ids=["doubled", "zeroed", "sign flipped", "gain of 0.2 percent", "truncated not rounded"],
)
def test_bias_is_seen_at_any_scale(mutant: object, why: str, scale: float) -> None:
    _, reference = product(torch.bfloat16)
    reference = reference * scale
    measured = mutant(reference).to(torch.bfloat16)  # type: ignore[operator]
    reason = judged(measured, reference, torch.bfloat16)
    assert reason is not None and why in reason


def test_softmax_rows_that_sum_to_099_fail() -> None:
    reference = torch.softmax(
        torch.randn(64, 4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1
    )
    assert judged(reference.to(torch.bfloat16), reference, torch.bfloat16, 1) is None
    assert judged((reference * 0.99).to(torch.bfloat16), reference, torch.bfloat16, 1) is not None


def test_dropped_keys_without_gain_are_seen_by_the_tail() -> None:
    right, reference = product(torch.bfloat16)
    wrong = right.clone()
    wrong[7, 11] += 3.0 * float(reference.square().mean().sqrt())
    assert judged(wrong, reference, torch.bfloat16) is not None


def test_bf16_accumulation_in_chunks_fails() -> None:
    a = torch.randn(128, 4096, generator=torch.Generator().manual_seed(3)).bfloat16()
    b = torch.randn(4096, 128, generator=torch.Generator().manual_seed(4)).bfloat16()
    total = torch.zeros(128, 128, dtype=torch.bfloat16)
    for start in range(0, 4096, 512):
        total += (a[:, start : start + 512].float() @ b[start : start + 512].float()).bfloat16()
    assert judged(total, a.double() @ b.double(), torch.bfloat16, 4096) is not None


def test_one_lone_nan_is_an_error_and_two_agree() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert numerics.nonfinite_mismatches(x, x) == 0
    assert numerics.nonfinite_mismatches(x, torch.tensor([1.0, 2.0, math.inf, math.inf])) == 2
    assert numerics.scale_free_error(torch.tensor([math.nan]), torch.tensor([1.0])) == math.inf


def test_gain_is_exact_on_known_cases() -> None:
    reference = torch.tensor([1.0, -2.0, 3.0])
    assert numerics.compare(reference * 2, reference).gain == pytest.approx(1.0)
    same = numerics.compare(reference, reference)
    assert (same.gain, same.gain_z) == (0.0, 0.0)


def test_tiny_values_do_not_underflow_to_a_pass() -> None:
    reference = torch.full((8,), 1e-200, dtype=torch.float64)
    assert numerics.scale_free_error(reference * 2, reference) == pytest.approx(1.0)
    assert numerics.scale_free_error(torch.ones(3), torch.zeros(3)) == math.inf
    assert numerics.scale_free_error(torch.zeros(3), torch.zeros(3)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_ulp_moves_every_number_to_a_neighbour(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(5)).to(dtype)
    x[0] = 0.0
    moved = numerics.perturb_one_ulp(x, key=9)
    assert torch.equal(moved, numerics.perturb_one_ulp(x, key=9))
    assert moved[0] == 0.0 and bool((moved[1:] != x[1:]).all())
    back = torch.where(
        moved > x,
        torch.nextafter(moved, torch.full_like(x, -math.inf)),
        torch.nextafter(moved, torch.full_like(x, math.inf)),
    )
    assert torch.equal(back[1:], x[1:])


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        numerics.compare(torch.zeros(2), torch.zeros(1, 2))


def test_checksum_bound_holds_on_right_products_and_is_finite_for_underflow() -> None:
    generator = torch.Generator().manual_seed(7)
    worst = 0.0
    for k, n in [(8, 8), (96, 256), (512, 96)]:
        a = torch.randn(64, k, generator=generator)
        w = torch.randn(k, n, generator=generator)
        difference = ((a @ w).sum(-1) - a @ w.sum(-1)).abs()
        bound = numerics.checksum_bound(a.norm(dim=-1), w.norm(), k, n, None, torch.float32)
        worst = max(worst, float((difference / bound).max()))
    assert worst < 0.6
    tiny = numerics.checksum_bound(torch.zeros(1), torch.ones(()), 4, 4, None, torch.float32)
    assert float(tiny) == pytest.approx(1e-18)


def test_fp32_read_through_bf16_moves_by_bf16s_unit() -> None:
    values = torch.randn(500).bfloat16()
    moved = numerics.perturb_one_ulp(values.float(), 3, torch.bfloat16)
    neighbours = [torch.nextafter(values, torch.tensor(to).bfloat16()) for to in (-math.inf, math.inf)]  # fmt: skip
    assert ((moved == neighbours[0].float()) | (moved == neighbours[1].float())).all()
    edges = torch.tensor([0.0, 1e-44, math.inf, -math.inf, torch.finfo(torch.float32).max])
    for key in range(4):
        kept = numerics.perturb_one_ulp(edges, key, torch.bfloat16)
        assert torch.equal(kept[:4], edges[:4]) and math.isfinite(kept[4])
    assert torch.equal(
        numerics.perturb_one_ulp(values, 3, torch.bfloat16), numerics.perturb_one_ulp(values, 3)
    )
