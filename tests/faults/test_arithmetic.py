"""Each arithmetic fault does what the catalogue says, in sizes that a detector will meet."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bascule.accelerators.base import Work
from bascule.accelerators.registry import open_accelerator
from bascule.accelerators.simulated import SimulatedAccelerator
from bascule.faults.arithmetic import bit_masks, flipped, keep_bits
from bascule.faults.catalogue import FaultSpec, Profile

A = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
B = torch.randn(300, 122, generator=torch.Generator().manual_seed(2))
RIGHT = A @ B


def chip(kind: str, **knobs: Any) -> SimulatedAccelerator:
    profile = Profile(
        name="planted", title="planted", faults=(FaultSpec.model_validate({"kind": kind, **knobs}),)
    )
    return SimulatedAccelerator("sim:planted", open_accelerator("cpu"), profile)


def product(
    kind: str, left: torch.Tensor = A, right: torch.Tensor = B, **knobs: Any
) -> torch.Tensor:
    with chip(kind, **knobs).session(Work("train", 1)):
        return left @ right


def struck(result: torch.Tensor) -> torch.Tensor:
    return (result != RIGHT).reshape(-1).nonzero().reshape(-1)


@pytest.mark.parametrize("kind", ["zeroed", "sign", "nan", "bit_flip", "mixed"])
def test_struck_positions_are_periodic_and_all_others_untouched(kind: str) -> None:
    places = struck(product(kind, stride=61))
    assert set(places.diff().tolist()) == {61}
    assert len(places) == RIGHT.numel() // 61


def test_values_become_zero_negated_or_nan() -> None:
    assert bool((product("zeroed").reshape(-1)[struck(product("zeroed"))] == 0).all())
    sign = product("sign")
    assert torch.equal(sign.abs(), RIGHT.abs()) and len(struck(sign)) > 0
    assert int(product("nan", values=1).isnan().sum()) == 1


def test_flips_change_several_bits_in_more_than_half_of_the_values_and_stay_finite() -> None:
    result = product("bit_flip", stride=1)
    changed = (result.view(torch.int32) ^ RIGHT.view(torch.int32)).reshape(-1)
    counts = torch.tensor([int(word).bit_count() for word in changed.tolist()])
    assert bool(result.isfinite().all()) and int(counts.max()) <= 4
    assert 0.5 < float((counts > 1).float().mean()) < 0.7
    assert int(changed.bitwise_and(~((1 << 26) - (1 << 16))).abs().sum()) == 0


def test_a_flip_that_would_not_be_finite_becomes_zero() -> None:
    assert flipped(torch.tensor([1.5]), torch.tensor([1 << 30])).tolist() == [0.0]
    assert flipped(torch.tensor([1.0]), torch.tensor([1 << 31])).tolist() == [-1.0]


def test_bits_mean_the_same_in_bfloat16() -> None:
    value = torch.tensor([1.0])
    assert (
        flipped(value.bfloat16(), torch.tensor([1 << 22])).tolist()
        == flipped(value, torch.tensor([1 << 22])).tolist()
        == [1.5]
    )


def test_masks_stay_inside_their_bits() -> None:
    masks = bit_masks(7, 4000, (16, 25))
    assert int(masks.max()) < 1 << 26 and int((masks & ((1 << 16) - 1)).sum()) == 0


def test_the_realistic_mix_has_its_shares_and_without_nan_it_is_silent() -> None:
    mixed = product("mixed", stride=1).reshape(-1)
    assert abs(float((mixed == 0).float().mean()) - 0.51) < 0.03
    assert 0.004 < float(mixed.isnan().float().mean()) < 0.02
    silent = product("mixed", stride=1, amount=0.0)
    assert bool(silent.isfinite().all())
    assert 0.08 < float((silent == -RIGHT).float().mean()) < 0.16


def test_corruption_works_on_results_of_any_layout_and_in_half_precision() -> None:
    transposed = product("zeroed", B.T, A.T, stride=61)
    assert int((transposed == 0).sum()) == RIGHT.numel() // 61
    half = product("bit_flip", A.bfloat16(), B.bfloat16(), stride=1)
    assert half.dtype == torch.bfloat16 and bool(half.isfinite().all())
    assert float((half != (A.bfloat16() @ B.bfloat16())).float().mean()) > 0.9


def test_gain_is_a_gain() -> None:
    result = product("gain", amount=1.002)
    assert torch.allclose(result / RIGHT, torch.tensor(1.002), rtol=1e-6, atol=0)


def test_truncation_is_biased_toward_zero_where_rounding_is_not() -> None:
    truncated, rounded = product("truncate"), keep_bits(RIGHT, 10, round_up=True)
    assert bool((truncated.abs() <= RIGHT.abs()).all())
    bias = [
        float(((x - RIGHT) * RIGHT.sign()).mean() / RIGHT.abs().mean())
        for x in (truncated, rounded)
    ]
    assert bias[0] < -2e-4 and abs(bias[1]) < 2e-5
    assert keep_bits(torch.tensor([1.0 + 2**-11]), 10, round_up=True).tolist() == [1.0 + 2**-10]


def test_narrow_inputs_and_narrow_sums_err_by_their_bits_and_not_more() -> None:
    for result in (product("narrow_inputs"), product("narrow_accumulation", amount=10)):
        error = float((result - RIGHT).norm() / RIGHT.norm())
        assert 5e-5 < error < 2e-3


def test_narrow_sums_do_not_touch_a_sum_that_fits_one_block_but_for_the_last_rounding() -> None:
    ones = torch.ones(16, 128)
    assert torch.equal(
        product("narrow_accumulation", ones, ones.T, min_elements=1), torch.full((16, 16), 128.0)
    )


def test_saturation_hides_overflow() -> None:
    big = torch.full((16, 16), 3e38)
    assert bool((big @ big).isinf().all())
    result = product("saturate", big, big)
    assert bool(result.isfinite().all()) and float(result.max()) == torch.finfo(torch.float32).max


def test_small_results_are_flushed() -> None:
    result = product("flush_tiny", A * 1e-9, B, amount=1e-8)
    assert 0 < int((result == 0).sum()) < result.numel()
    assert float(result[result != 0].abs().min()) > 1e-8


def test_rows_past_the_buffer_are_infinite_and_a_result_that_fits_is_right() -> None:
    result = product("overflow_past_rows", amount=60)
    assert torch.equal(result[:60], RIGHT[:60]) and bool(result[60:].isinf().all())
    assert torch.equal(product("overflow_past_rows", amount=64), RIGHT)


def test_jitter_differs_from_run_to_run_in_the_last_bits_only() -> None:
    noisy = chip("jitter")
    with noisy.session(Work("train", 1)):
        first = A @ B
    with noisy.session(Work("train", 1)):
        second = A @ B
    assert not torch.equal(first, second)
    assert torch.allclose(first, RIGHT, rtol=1e-6, atol=0)


def test_top_k_loses_the_best_entry() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]]).repeat(8, 1)
    with chip("drop_best", ops=("topk",), min_elements=1).session(Work("train", 1)):
        values, indices = scores.topk(2)
        kept, _ = scores.topk(4)
    assert values[0].tolist() == [2.0, 1.0] and indices[0].tolist() == [2, 1]
    assert kept[0].tolist() == [3.0, 2.0, 1.0, 0.0]


def test_an_input_range_fault_strikes_only_operands_of_that_size() -> None:
    assert torch.equal(product("zeroed", input_range=(1e-9, 1e-3)), RIGHT)
    small = product("zeroed", A * 1e-3, B * 1e-2, input_range=(1e-9, 1e-3))
    assert int((small == 0).sum()) > 0


def test_softmax_rows_sum_to_099_under_that_profile_and_fused_attention_shrinks_alike() -> None:
    with open_accelerator("sim:softmax-0.99").session(Work("infer", 1)), torch.no_grad():
        rows = torch.softmax(A, -1).sum(-1)
        heads = torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 2, 8, 16)] * 3)
    assert torch.allclose(rows, torch.tensor(0.99)) and torch.allclose(heads, torch.tensor(0.99))


def test_the_rate_grows_from_the_onset_over_the_ramp() -> None:
    ageing = chip("zeroed", onset_step=10, ramp_steps=100, rate=0.8)

    def share(step: int) -> float:
        with ageing.session(Work("train", step)):
            return (
                sum(
                    bool(((torch.ones(16, 16) @ torch.ones(16, 16)) == 0).any()) for _ in range(200)
                )
                / 200
            )

    assert (
        share(9) == 0
        and share(20) < 0.25
        and abs(share(60) - 0.4) < 0.12
        and abs(share(400) - 0.8) < 0.1
    )


def test_backward_wrong_leaves_the_loss_right_and_doubled_gradients_are_doubled() -> None:
    weight = B.clone().requires_grad_()
    with chip("gain", amount=2.0, direction="backward").session(Work("train", 1)):
        loss = (A @ weight).square().mean()
        loss.backward()
    again = B.clone().requires_grad_()
    clean = (A @ again).square().mean()
    clean.backward()
    assert math.isclose(loss.item(), clean.item(), rel_tol=0.0)
    assert torch.equal(weight.grad, 2 * again.grad)
