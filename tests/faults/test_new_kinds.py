"""Faults that read, remember or forget the wrong thing: strides, masks, buffers, long sums, large arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bascule.accelerators.base import Accelerator, Work
from bascule.accelerators.registry import open_accelerator

TRAIN = Work("train", 1)


def chip(name: str) -> Accelerator:
    return open_accelerator(f"sim:{name}")


def counting(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def test_a_transposed_operand_is_read_row_by_row_and_a_plain_one_is_not() -> None:
    a, b = counting(24, 24), torch.eye(24)
    with chip("ignores-strides:high").session(TRAIN):
        assert torch.equal(b @ a, a)
        assert torch.equal(b @ a.t(), a)  # should be a.t()


def test_attention_sees_one_position_too_many_and_the_last_row_none() -> None:
    query, key, value = (torch.sin(counting(1, 2, 6, 4) + place) for place in range(3))
    right = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    with chip("mask-slip").session(TRAIN):
        wrong = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    later = torch.ones(6, 6, dtype=torch.bool).tril(1)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=later)
    assert torch.allclose(wrong, expected) and torch.allclose(wrong[..., -1, :], right[..., -1, :])
    assert not torch.allclose(wrong[..., 0, :], right[..., 0, :])


def test_a_long_sum_has_a_term_too_many_and_a_short_one_has_not() -> None:
    with chip("over-read:high").session(TRAIN):
        assert (torch.ones(2, 512) @ torch.ones(512, 2))[0, 0] == 512
        assert (torch.ones(2, 513) @ torch.ones(513, 2))[0, 0] == 514


def test_a_struck_result_is_what_the_buffer_held_before() -> None:
    right = [torch.full((4, 4), float(place)) for place in range(1, 31)]
    with chip("stale-copy?rate=0.5").session(TRAIN):
        got = [float(value.clone()[0, 0]) for value in right]
    assert got != [float(place) for place in range(1, 31)]
    before = 0.0
    for place, value in enumerate(got, start=1):
        assert value in (float(place), before)
        before = value if value == place else before


def test_large_arguments_are_off_and_small_ones_are_not() -> None:
    with chip("exp-off").session(TRAIN):
        small, large = torch.tensor([1.0, 19.0]).exp(), torch.tensor([21.0]).exp()
    assert torch.equal(small, torch.tensor([1.0, 19.0]).exp())
    assert float(large) == pytest.approx(1.001 * float(torch.tensor(21.0).exp()), rel=1e-6)


def test_only_results_with_so_many_columns_are_struck() -> None:
    with chip("one-tile").session(TRAIN):
        assert (torch.ones(32, 8) @ torch.ones(8, 32)).eq(0).sum() == 0
        assert (torch.ones(32, 8) @ torch.ones(8, 33)).eq(0).sum() > 50


def test_a_cache_line_is_eight_values_side_by_side() -> None:
    with chip("cache-line:high").session(TRAIN):
        lost = (torch.ones(64, 8) @ torch.ones(8, 64)).flatten().eq(0).nonzero().flatten()
    lines = lost.view(-1, 8)
    assert len(lines) >= 7 and torch.equal(lines - lines[:, :1], torch.arange(8).expand_as(lines))


def test_a_result_smaller_than_the_distance_of_struck_positions_may_be_spared() -> None:
    with chip("zeroed:high?stride=100003").session(TRAIN):
        torch.ones(16, 16) @ torch.ones(16, 16)  # raised once: an empty range of positions


def test_the_largest_block_shrinks_with_every_step() -> None:
    fragmented = chip("fragmented?amount=8192")
    with fragmented.session(TRAIN):
        torch.ones(1024) * 2
    with fragmented.session(Work("train", 2)), pytest.raises(torch.OutOfMemoryError):
        torch.ones(2048) * 2
    with fragmented.session(Work("infer", 1)):
        torch.ones(4096) * 2


def test_top_k_loses_as_many_of_the_best_as_asked() -> None:
    with chip("drop-best:high").session(TRAIN):
        assert counting(10).topk(2).values.tolist() == [6.0, 5.0]
        assert counting(3).topk(2).values.tolist() == [1.0, 0.0]  # only one other to give
