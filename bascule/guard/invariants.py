"""Laws of what is neither a matrix product nor fused attention: softmax, its logarithm, RMS norm, copies, and the size of an update.

    softmax         no entry below zero, rows sum to one;  backward: rows of dX sum to zero
    log-softmax     exp of rows sums to one, and Y - X is one number a row;  backward: rows of dX sum to zero
    log-probability of a target: the kept sum is that of exp(x - largest x), and the target's follows;  backward: rows of dX sum to zero
    RMS norm        for y = w x / rms(x): p.y = p.(w x) / rms(x) for a fixed p, and |y| = |w x| / rms(x)
    a copy          what was copied, cast or joined arrives, bit for bit
    an update       no parameter's length changes by more than its optimizer can move it (train/optimizer.reach)

The first functions give the largest break of a law over its bound, a scalar on the chip: over 1, or NaN, is a break. Bounds are the rounding of
the sums involved, u their unit, n the row's length. A row whose inputs are not finite obeys no law; the operator that made them so is
the one to name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bascule import numerics
from bascule.model import kernels  # noqa: F401  (registers our own operators)

aten, ours = torch.ops.aten, torch.ops.bascule

MARGIN = 8.0
"""As for attention. The largest breaks seen in clean use stand in tests/guard/test_invariants.py, which measures them."""

LENGTH_ROUNDING = 1e-4
"""Share of a 2-norm that two ways of adding up millions of squares may differ by; an update that matters moves more."""


@torch.no_grad()
def softmax_ratio(x: Tensor, y: Tensor, dim: int) -> Tensor:
    wide, size = _wide(y), x.shape[dim]
    mass = (wide.sum(dim) - 1.0).abs() / (MARGIN * _unit(y) * math.sqrt(size))
    below = torch.where(wide.amin(dim) < 0, math.inf, 0.0)
    return _worst(torch.maximum(mass, below), x.amax(dim))


@torch.no_grad()
def log_softmax_ratio(x: Tensor, y: Tensor, dim: int) -> Tensor:
    wide_x, wide_y = _wide(x), _wide(y)
    reach = wide_x.abs().amax(dim) + wide_y.abs().amax(dim)
    room = MARGIN * _unit(y) * (math.sqrt(x.shape[dim]) + reach)
    mass = (wide_y.exp().sum(dim) - 1.0).abs()
    shift = wide_y - wide_x
    uneven = shift.amax(dim) - shift.amin(dim)
    return _worst(torch.maximum(mass, uneven) / room, reach)


@torch.no_grad()
def softmax_backward_ratio(dy: Tensor, y: Tensor, dx: Tensor, dim: int) -> Tensor:
    """dX = Y (dY - Y.dY): what the row's entries gain, others of the row lose."""
    wide_dy = _wide(dy)
    norm = torch.linalg.vector_norm
    reach = norm(wide_dy, dim=dim) * norm(_wide(y), dim=dim)
    return _conserved(dx, reach, dim)


@torch.no_grad()
def log_softmax_backward_ratio(dy: Tensor, y: Tensor, dx: Tensor, dim: int) -> Tensor:
    """dX = dY - exp(Y) sum(dY)."""
    wide_dy = _wide(dy)
    reach = torch.linalg.vector_norm(wide_dy, dim=dim) + wide_dy.sum(dim).abs()
    return _conserved(dx, reach, dim)


@torch.no_grad()
def token_logprobs_ratio(x: Tensor, targets: Tensor, logp: Tensor, sums: Tensor) -> Tensor:
    """`x` (..., V); of each row one target, its log-probability, and the sum of exp(x - largest x)."""
    wide_x, wide_sums = _wide(x), _wide(sums)
    shifted = wide_x - wide_x.amax(-1, keepdim=True)
    picked = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    room = MARGIN * _unit(x) * (math.sqrt(x.shape[-1]) + picked.abs())
    mass = (shifted.exp().sum(-1) / wide_sums - 1.0).abs()
    apart = (picked - wide_sums.log() - _wide(logp)).abs()
    return _worst(torch.maximum(mass, apart) / room, wide_x.abs().amax(-1))


@torch.no_grad()
def token_logprobs_backward_ratio(d: Tensor, dx: Tensor) -> Tensor:
    """dX = d (one at the target - probabilities)."""
    return _conserved(dx, 2.0 * _wide(d).abs(), -1)


@torch.no_grad()
def rms_norm_ratio(
    x: Tensor, weight: Tensor | None, eps: float | None, y: Tensor, probe: Tensor
) -> Tensor:
    """`x`, `y` (..., n); `probe` (n,) as for products. The scale is worked out by another road than the norm's own: a 2-norm."""
    size = x.shape[-1]
    wide_x, wide_y = _wide(x), _wide(y)
    scaled = wide_x if weight is None else wide_x * _wide(weight)
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    norm = torch.linalg.vector_norm
    rms = (norm(wide_x, dim=-1).square() / size + floor).sqrt()
    length = norm(scaled, dim=-1) / rms
    room = MARGIN * _unit(y) * math.sqrt(size) * length + numerics.CHECKSUM_FLOOR
    along = ((wide_y * probe).sum(-1) - (scaled * probe).sum(-1) / rms).abs()
    energy = (norm(wide_y, dim=-1) - length).abs()
    return _worst(torch.maximum(along, energy) / room, length)


@torch.no_grad()
def copied_ratio(
    sources: Sequence[Tensor], y: Tensor, dim: int = 0, stacked: bool = False
) -> Tensor:
    """inf when `y` does not hold the `sources`, joined along `dim` (one source: its copy or cast, broadcast to `y`'s shape). A cast
    is held to the cast done again; there NaN is passed over, since its payload is nobody's promise."""
    wrong = []
    at = 0
    for source in sources:
        if len(sources) == 1 and not stacked:
            place = y
        elif stacked:
            place, at = y.select(dim, at), at + 1
        elif source.shape == (0,):  # torch.cat lets an empty vector stand for nothing
            continue
        else:
            width = source.shape[dim]
            place, at = y.narrow(dim, at, width), at + width
        wrong.append(_differs(source, place))
    return torch.where(torch.stack(wrong).any(), math.inf, 0.0) if wrong else y.new_zeros(())


def _differs(source: Tensor, copy: Tensor) -> Tensor:
    if source.device != copy.device or not copy.numel():
        return torch.zeros((), dtype=torch.bool, device=copy.device)
    bits = _BITS.get(copy.element_size())
    if source.dtype == copy.dtype and bits is not None:
        # Not `!=` and any(): on a CPU they take 4 times as long, for integers are compared one by one.
        flipped = source.detach().view(bits) ^ copy.detach().view(bits)
        return (flipped.amax() != 0) | (flipped.amin() != 0)
    cast = source.detach().to(copy.dtype)
    return ((cast != copy) & (cast == cast)).any()


def overreach(
    before: Tensor, after: Tensor, reach: Mapping[str, tuple[float, float]], names: Sequence[str]
) -> tuple[str, float] | None:
    """The parameter whose length changed most beyond its optimizer's reach, and by how many times; None where all kept within. No
    vector's length changes by more than the length of what was added. `reach`: by name, (length, share of the present length)."""
    # Plain numbers: a model has some hundred parameters, and ten small operators on them cost ten times this loop.
    far: tuple[str, float] | None = None
    for name, old, new in zip(names, before.tolist(), after.tolist(), strict=True):
        length, share = reach.get(name, (math.inf, 0.0))
        room = length + (share + LENGTH_ROUNDING) * old
        moved = abs(new - old)
        ratio = moved / room if room else (math.inf if moved else 0.0)
        ratio = math.inf if math.isnan(ratio) else ratio
        if ratio > 1.0 and (far is None or ratio > far[1]):
            far = (name, ratio)
    return far


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Operators that the dispatcher sees by themselves: (arguments, output) to ratio. RMS norm is seen as a function (guard/checksum):
# where there is no fused kernel the dispatcher sees only its pieces.
LAWS: dict[Any, Callable[[Sequence[Any], Any], Tensor]] = {
    aten._softmax.default: lambda a, y: softmax_ratio(a[0], y, a[1]),
    aten._log_softmax.default: lambda a, y: log_softmax_ratio(a[0], y, a[1]),
    aten._softmax_backward_data.default: lambda a, dx: softmax_backward_ratio(a[0], a[1], dx, a[2]),
    aten._log_softmax_backward_data.default: lambda a, dx: log_softmax_backward_ratio(
        a[0], a[1], dx, a[2]
    ),
    ours.token_logprobs.default: lambda a, y: token_logprobs_ratio(a[0], a[1], *y),
    ours.token_logprobs_backward.default: lambda a, dx: token_logprobs_backward_ratio(a[0], dx),
    aten.clone.default: lambda a, y: copied_ratio(a[:1], y),
    aten._to_copy.default: lambda a, y: copied_ratio(a[:1], y),
    aten.copy_.default: lambda a, y: copied_ratio(a[1:2], y),
    aten.cat.default: lambda a, y: copied_ratio(a[0], y, a[1] if len(a) > 1 else 0),
    aten.stack.default: lambda a, y: copied_ratio(a[0], y, a[1] if len(a) > 1 else 0, True),
}


def _conserved(dx: Tensor, reach: Tensor, dim: int) -> Tensor:
    room = MARGIN * _unit(dx) * math.sqrt(dx.shape[dim]) * reach + numerics.CHECKSUM_FLOOR
    return _worst(_wide(dx).sum(dim).abs() / room, reach)


def _worst(ratio: Tensor, must_be_finite: Tensor) -> Tensor:
    if not ratio.numel():
        return ratio.new_zeros(())
    return torch.where(torch.isfinite(must_be_finite), ratio, 0.0).amax()


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _unit(x: Tensor) -> float:
    return numerics.tolerance(x.dtype).unit
