"""How exact products are: right ones are silent in whatever order they were added up, accumulators that are too narrow are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bascule.accelerators.base import Work
from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.faults.arithmetic import keep_bits
from bascule.guard import spot
from bascule.guard.checksum import Checksums, Violation
from bascule.model import weights
from bascule.model.transformer import Transformer

ROWS, COLUMNS = 24, 40


def in_order(terms: np.ndarray) -> np.ndarray:
    """Added one by one in fp32: the last dimension is gone."""
    total = np.zeros(terms.shape[:-1], dtype=np.float32)
    for at in range(terms.shape[-1]):
        total = total + terms[..., at]
    return total


def pairwise(terms: np.ndarray) -> np.ndarray:
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[..., :1])], -1)
        terms = terms[..., ::2] + terms[..., 1::2]
    return terms[..., 0]


def in_lanes(terms: np.ndarray, width: int = 8) -> np.ndarray:
    """Every eighth term by itself, as vector units add."""
    padded = np.zeros((*terms.shape[:-1], -(-terms.shape[-1] // width) * width), dtype=np.float32)
    padded[..., : terms.shape[-1]] = terms
    parts = padded.reshape(*terms.shape[:-1], -1, width)
    return in_order(in_order(parts.swapaxes(-1, -2)))


def in_blocks(terms: np.ndarray, size: int = 128) -> np.ndarray:
    parts = [in_order(terms[..., at : at + size]) for at in range(0, terms.shape[-1], size)]
    return in_order(np.stack(parts, -1))


ORDERS = {
    "first to last": in_order,
    "last to first": lambda terms: in_order(terms[..., ::-1]),
    "pairwise": pairwise,
    "in lanes": in_lanes,
    "in blocks": in_blocks,
}

SIGNS = {
    "without order": lambda k, rng: rng.standard_normal((k, 1)),
    "all one way": lambda k, rng: np.ones((k, 1)),
    "this way, then that": lambda k, rng: np.where(np.arange(k) < k // 2, 1.0, -1.0)[:, None],
    "all at the end": lambda k, rng: np.where(np.arange(k) < 3 * k // 4, 1e-3, 1.0)[:, None],
    "lane by lane": lambda k, rng: np.where(np.arange(k) % 8 < 4, 1.0, -1.0)[:, None],
    "one that is huge": lambda k, rng: np.where(np.arange(k) == k // 3, 1e6, 1.0)[:, None],
}


def operands(k: int, signs: str, size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    left = np.abs(rng.standard_normal((ROWS, k))) * size
    right = SIGNS[signs](k, rng) * np.abs(rng.standard_normal((k, COLUMNS)))
    return left.astype(np.float32), right.astype(np.float32)


def found(left: Tensor, right: Tensor, output: Tensor, **more: object) -> Tensor:
    taken = spot.sample(left, right, output, **more)  # type: ignore[arg-type]
    assert taken is not None
    return spot.squares(taken)


@settings(max_examples=60, deadline=None)
@given(
    k=st.sampled_from([1, 2, 7, 16, 64, 96, 200, 640]),
    signs=st.sampled_from(sorted(SIGNS)),
    order=st.sampled_from(sorted(ORDERS)),
    size=st.sampled_from([1e-30, 1e-4, 1.0, 1e20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_product_that_was_added_up_in_fp32_is_exact_enough_in_any_order(
    k: int, signs: str, order: str, size: float, seed: int
) -> None:
    left, right = operands(k, signs, size, seed)
    with np.errstate(under="ignore"):
        output = ORDERS[order](left[:, None, :] * right.T[None])
    ratios = found(torch.from_numpy(left), torch.from_numpy(right), torch.from_numpy(output))
    assert spot.ratio_of_one(ratios) <= 1.0
    assert spot.ratio_of_all([ratios]) <= 1.0


@pytest.mark.parametrize("k", [16, 64, 128, 512, 3000])
@pytest.mark.parametrize("bits", [16, 18])
def test_a_sum_kept_in_fewer_bits_is_not(k: int, bits: int) -> None:
    left, right = (torch.from_numpy(x) for x in operands(k, "without order", 1.0, k))
    total = torch.zeros(ROWS, COLUMNS)
    for at in range(0, k, 128):
        part = left[:, at : at + 128] @ right[at : at + 128]
        total = keep_bits(total + part, bits, round_up=True)
    assert spot.ratio_of_all([found(left, right, total)]) > 1.0
    assert spot.ratio_of_all([found(left, right, left @ right)]) < 0.5


def test_of_stacks_scaled_sums_and_turned_operands() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 20, 30), torch.randn(3, 30, 50)
    addend = 100 * torch.randn(3, 1, 50)
    right_one = torch.baddbmm(addend, left, right, beta=0.5, alpha=2.0)
    for turn in range(9):
        told = found(left, right, right_one, addend=0.5 * addend, alpha=2.0, turn=turn)
        assert spot.ratio_of_all([told]) <= 1.0
        told = found(left, right, right_one + 1e-4, addend=0.5 * addend, alpha=2.0, turn=turn)
        assert spot.ratio_of_all([told]) > 1.0
    turned = torch.randn(30, 20).T
    assert spot.ratio_of_all([found(turned, right[0], turned @ right[0])]) <= 1.0


def test_which_outputs_are_looked_at_goes_round_and_reaches_all() -> None:
    seen = set()
    for turn in range(40 // spot.SIDE):
        seen |= set(range(40)[spot._some(40, spot.SIDE, turn)])
    assert seen == set(range(40))
    assert list(range(3)[spot._some(3, spot.SIDE, 5)]) == [0, 1, 2]


def test_other_types_and_what_is_not_finite_are_passed_over() -> None:
    half = torch.ones(4, 4, dtype=torch.bfloat16)
    assert spot.sample(half, half, half @ half) is None
    assert spot.sample(torch.ones(0, 4), torch.ones(4, 4), torch.ones(0, 4)) is None
    a = torch.full((4, 4), 1e30)
    assert spot.ratio_of_one(found(a, a, a @ a)) == 0.0
    output = torch.ones(4, 4) @ torch.ones(4, 4)
    output[0] = math.nan
    assert spot.ratio_of_one(found(torch.ones(4, 4), torch.ones(4, 4), output)) == 0.0


def checked(name: str, step: int) -> Checksums:
    """Forward and backward of a small model on that chip, under checksums."""
    model = Transformer(ModelConfig(preset="tick"))
    weights.initialise(model, step)
    tokens = torch.arange(16 * 32).view(16, 32) * (7 + step) % 101
    chip, checksums = open_accelerator(name, seed=3), Checksums(turn=step)
    with chip.session(Work("train", step=step)), checksums:
        logits = model(tokens).logits_BTV
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())  # fmt: skip
        loss.backward()
    return checksums


@pytest.mark.parametrize("name", ["cpu", "sim:jitter:low@cpu", "sim:jitter@cpu"])
def test_steps_of_a_right_chip_and_of_one_with_other_last_bits_keep_well_below(name: str) -> None:
    for step in range(1, 9):
        checksums = checked(name, step)
        assert not checksums.violations()
        assert checksums.worst_ratio() < 0.8


def test_the_campaigns_narrow_accumulator_is_seen_in_every_step() -> None:
    """It moved the final weights by two to three ulps' worth and was certified in 3 of 4 runs: each product's error is far below its
    checksum's bound."""
    for step in range(1, 9):
        found = checked("sim:narrow-accumulation:low@cpu", step).violations()
        assert found and all(isinstance(one, Violation) for one in found)


def test_products_that_are_each_within_their_bound_are_told_together() -> None:
    told = Checksums()
    torch.manual_seed(0)
    for _ in range(8):
        left, right = torch.randn(64, 256), torch.randn(256, 64)
        with told:
            output = torch.mm(left, right)
        taken = spot.sample(left, right, keep_bits(output, 18, round_up=True))
        if told._samples:
            told._samples[max(told._samples)] = taken  # type: ignore[assignment]
    (found,) = told.violations()
    assert "all products together" in str(found) and 1.0 < found.ratio < 4.0
    assert told.worst_ratio() == found.ratio
