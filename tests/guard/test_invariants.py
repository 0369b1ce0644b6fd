"""Laws of softmax, its logarithm, RMS norm and updates: right results keep them with room to spare, small wrongs break them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from bascule.guard.bits import lengths
from bascule.guard.checksum import Checksums
from bascule.guard.invariants import (
    copied_ratio,
    log_softmax_backward_ratio,
    log_softmax_ratio,
    overreach,
    rms_norm_ratio,
    softmax_backward_ratio,
    softmax_ratio,
    token_logprobs_backward_ratio,
    token_logprobs_ratio,
)
from bascule.model import fused, kernels
from bascule.train.optimizer import SPECTRAL_REACH, SplitOptimizer, adamw_reach, orthogonalise

aten = torch.ops.aten
needs_kernels = pytest.mark.skipif(kernels.compiled() is None, reason="no C++ compiler here")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(64, 7), (32, 128), (4, 5, 1000), (2, 20_000)]


def numbers(seed: int, shape, dtype, scale=1.0):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def both_ways(x, dy, softmax):  # type: ignore[no-untyped-def]
    forward, backward = (
        (aten._softmax, aten._softmax_backward_data)
        if softmax
        else (aten._log_softmax, aten._log_softmax_backward_data)
    )
    y = forward(x, -1, False)
    return y, backward(dy, y, -1, x.dtype)


def worst(x, dy, y, dx, softmax) -> float:  # type: ignore[no-untyped-def]
    if softmax:
        return float(torch.maximum(softmax_ratio(x, y, -1), softmax_backward_ratio(dy, y, dx, -1)))
    ratios = log_softmax_ratio(x, y, -1), log_softmax_backward_ratio(dy, y, dx, -1)
    return float(torch.maximum(*ratios))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softmax", [True, False])
def test_right_softmaxes_use_less_than_half_of_what_is_allowed(softmax: bool, dtype) -> None:  # type: ignore[no-untyped-def]
    for seed, shape in enumerate(SHAPES):
        for scale in (1e-4, 1.0, 30.0):
            x, dy = numbers(seed, shape, dtype, scale), numbers(seed + 9, shape, dtype, 1e-5)
            assert worst(x, dy, *both_ways(x, dy, softmax), softmax) < 0.5, (shape, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_norms_use_less_than_half_of_what_is_allowed(dtype) -> None:  # type: ignore[no-untyped-def]
    for seed, shape in enumerate(SHAPES):
        for scale in (1e-4, 1.0, 1e3):
            x = numbers(seed, shape, dtype, scale)
            weight = numbers(seed + 1, shape[-1:], dtype)
            probe = numbers(3, shape[-1:], torch.float32 if dtype != torch.float64 else dtype)
            y = F.rms_norm(x, shape[-1:], weight, 1e-6)
            assert float(rms_norm_ratio(x, weight, 1e-6, y, probe)) < 0.5, (shape, scale)


def test_small_wrongs_break_them() -> None:
    x, dy = numbers(0, (32, 128), torch.float32), numbers(1, (32, 128), torch.float32)
    for softmax in (True, False):
        y, dx = both_ways(x, dy, softmax)
        for wrong_y in (y * 1.0001, y.clone().index_fill_(0, torch.tensor(3), 0.0)):
            assert worst(x, dy, wrong_y, dx, softmax) > 1
        dropped = dx.clone()
        dropped[5, 7] = 0
        assert worst(x, dy, y, dropped, softmax) > 1
        assert worst(x, dy, y, dx + 1e-5, softmax) > 1
    y, dx = both_ways(x, dy, True)
    negative = y.clone()
    negative[0, 0], negative[0, 1] = -y[0, 0], y[0, 1] + 2 * y[0, 0]  # the sum is still one
    assert worst(x, dy, negative, dx, True) == math.inf
    y, dx = both_ways(x, dy, False)
    swapped = y.flip(-1)  # still a distribution, of other tokens
    assert worst(x, dy, swapped, dx, False) > 1
    weight, probe = numbers(2, (128,), torch.float32), numbers(3, (128,), torch.float32)
    y = F.rms_norm(x, (128,), weight, 1e-6)
    one_off = y.clone()
    one_off[4, 9] += 1e-3
    for wrong in (y * 1.0001, one_off, -y, y.flip(-1), y * math.nan):
        assert not float(rms_norm_ratio(x, weight, 1e-6, wrong, probe)) <= 1


def test_rows_that_were_bad_before_blame_nobody() -> None:
    x = numbers(0, (4, 16), torch.float32)
    x[1, 3], x[2, 5] = math.nan, math.inf
    dy = torch.ones_like(x)
    y, dx = both_ways(x, dy, False)
    assert float(log_softmax_ratio(x, y, -1)) <= 1
    masked = torch.full((2, 8), -math.inf)
    masked[0, :4] = 1.0  # the second row attends to nothing: NaN by definition
    assert float(softmax_ratio(masked, masked.softmax(-1), -1)) <= 1
    y = F.rms_norm(x, (16,), None, 1e-6)
    assert float(rms_norm_ratio(x, None, 1e-6, y, torch.ones(16))) <= 1


def test_the_watched_step_sees_norm_and_softmax_and_names_the_norm() -> None:
    weight = torch.ones(8, requires_grad=True)
    x = numbers(0, (4, 8), torch.float32).requires_grad_()
    watch = Checksums(names={weight.untyped_storage().data_ptr(): "norm.weight"})
    with watch:
        F.cross_entropy(F.rms_norm(x, (8,), weight, 1e-6), torch.arange(4)).backward()
    assert watch.violations() == [] and watch.products_seen == 0
    computed = [check for _, check in watch._laws if check.op not in ("_to_copy", "clone", "copy_")]
    assert [check.op for check in computed] == [
        "rms_norm",
        "_log_softmax",
        "_log_softmax_backward_data",
    ]
    computed[0].ratio.fill_(math.nan)
    assert "rms_norm #0 of norm.weight (forward" in str(watch.violations()[0])


def test_a_copy_that_does_not_arrive_is_seen_and_every_right_one_passes() -> None:
    x = numbers(0, (6, 8), torch.float32)
    x[1, 2], x[3, 4], x[5, 0] = math.nan, -math.inf, -0.0
    watch = Checksums()
    with watch:
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
            source = x.nan_to_num(0.0, 0.0, 0.0).to(dtype) if dtype == torch.int64 else x.to(dtype)
            (
                source.t().clone(),
                source.t().contiguous(),
                torch.cat([source, source[:2], source.new_empty(0)]),
            )
            torch.stack([source, source], 1), torch.empty(2, 6, 8, dtype=dtype).copy_(source)
        torch.empty(0, 3).clone(), (x > 0).clone(), x.to(torch.complex128).clone()
    assert watch.violations() == []
    assert {check.op for _, check in watch._laws} >= {"clone", "_to_copy", "copy_", "cat"}

    y = x.clone()
    y[1, 2] = 0.0  # what was NaN is a number now
    assert float(copied_ratio([x], y)) == math.inf
    y = x.clone()
    y[5, 0] = 0.0  # only the sign of a zero
    assert float(copied_ratio([x], y)) == math.inf
    y = torch.cat([x, x, x])
    y[7] = y[8]
    assert float(copied_ratio([x, x, x], y)) == math.inf
    y = torch.stack([x, x], -1)
    y[0, 0, 1] += 1
    assert float(copied_ratio([x, x], y, -1, stacked=True)) == math.inf
    y = x.bfloat16()
    y[0, 0] *= 1.01
    assert float(copied_ratio([x], y)) == math.inf


def test_no_gradients_move_adamw_beyond_its_reach_and_the_worst_come_close() -> None:
    worst_seen = 0.0
    for kind in ("constant", "growing", "random", "one big one last"):
        p = torch.zeros(64)
        optimizer = SplitOptimizer({"bias": p}, learning_rate=1.0)
        for step in range(1, 41):
            grad = {
                "constant": torch.ones(64),
                "growing": torch.full((64,), (0.95 / 0.9) ** step),
                "random": numbers(step, (64,), torch.float32),
                "one big one last": torch.full((64,), 1e6 if step == 40 else 1e-6),
            }[kind]
            before = p.clone()
            optimizer.step({"bias": grad}, factor=1.0)
            share = float((p - before).abs().max()) / adamw_reach(optimizer.betas, step)
            assert share <= 1.0 + 1e-4, (kind, step)
            worst_seen = max(worst_seen, share)
    assert worst_seen > 0.99


def test_orthogonalised_matrices_stay_within_muons_reach() -> None:
    longest = 0.0
    for seed, (rows, columns) in enumerate([(4, 4), (16, 64), (48, 96), (1, 30)]):
        for spread in (0.0, 1.0, 6.0):  # singular values from equal to over six decades
            scale = torch.logspace(0, -spread, rows).diag()
            x = scale @ numbers(seed, (rows, columns), torch.float32)
            out = orthogonalise(x[None])[0]
            longest = max(longest, float(torch.linalg.matrix_norm(out, 2)))
    assert 0.9 < longest <= SPECTRAL_REACH


def test_no_update_goes_beyond_its_optimizers_reach_and_one_that_was_thrown_does() -> None:
    parameters = {
        "tall.weight": numbers(0, (40, 8), torch.float32),
        "experts": numbers(1, (3, 8, 24), torch.float32),
        "norm.weight": torch.ones(8),
    }
    optimizer = SplitOptimizer(
        parameters, learning_rate=0.1, muon_learning_rate=0.5, weight_decay=0.1
    )
    names = list(parameters)
    for step in range(6):
        before, reach = lengths(list(parameters.values())), optimizer.reach(1.0)
        grads = {
            name: numbers(step, tuple(p.shape), torch.float32, 10.0**step)
            for name, p in parameters.items()
        }
        optimizer.step(grads, factor=1.0)
        after = lengths(list(parameters.values()))
        assert overreach(before, after, reach, names) is None
    thrown = after.clone()
    thrown[1] *= 1e3
    found = overreach(before, thrown, reach, names)
    assert found is not None and found[0] == "experts" and found[1] > 10
    thrown[1] = math.nan
    found = overreach(before, thrown, reach, names)
    assert found is not None and found[0] == "experts"


@needs_kernels
def test_log_probabilities_of_our_own_keep_their_laws_with_logits_of_any_size() -> None:
    """Backward took a logsumexp off, whose rounding grows with the logits: a run at a high learning rate condemned its chip."""
    for scale in (1.0, 100.0, 10000.0):
        x = torch.randn(64, 130, generator=torch.Generator().manual_seed(1)) * scale
        targets, d = torch.arange(64) % 130, torch.linspace(-1.0, 1.0, 64)
        logp, sums = torch.ops.bascule.token_logprobs(x, targets)
        dx = torch.ops.bascule.token_logprobs_backward(d, x, targets, sums)
        assert float(token_logprobs_ratio(x, targets, logp, sums)) < 0.5
        assert float(token_logprobs_backward_ratio(d, dx)) < 0.5
        assert float(token_logprobs_ratio(x, targets, logp + 1e-3 * scale, sums)) > 1
        assert float(token_logprobs_ratio(x, targets, logp, sums * 1.0001)) > 1
        dx[3, 5] += 1e-4
        assert float(token_logprobs_backward_ratio(d, dx)) > 1


@needs_kernels
def test_the_watched_step_sees_our_own_norms_and_log_probabilities_and_names_the_norm() -> None:
    weight, watch = torch.ones(8, requires_grad=True), Checksums()
    watch.names = {weight.untyped_storage().data_ptr(): "norm.weight"}
    with watch:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        total, y = fused.add_rms_norm(x, fused.rms_norm(x, weight, 1e-6), weight, 1e-6)
        (fused.token_logprobs(y, torch.arange(4)) + total.sum(-1)).sum().backward()
    seen = [check.op for _, check in watch._laws]
    assert seen == ["rms_norm", "rms_norm", "token_logprobs", "token_logprobs_backward"]
    assert not watch.violations()
    watch._laws[1][1].ratio = torch.tensor(2.0)
    assert "rms_norm #0 of norm.weight (forward" in str(watch.violations()[0])
