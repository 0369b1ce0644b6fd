"""Laws of what is neither a matrix product nor fused attention: softmax, its logarithm, RMS norm, and the size of an update.

    softmax         no entry below zero, rows sum to one;  backward: rows of dX sum to zero
    log-softmax     exp of rows sums to one, and Y - X is one number a row;  backward: rows of dX sum to zero
    RMS norm        for y = w x / rms(x): p.y = p.(w x) / rms(x) for a fixed p, and |y| = |w x| / rms(x)
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

aten = torch.ops.aten

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
def lengths(parameters: Sequence[Tensor]) -> Tensor:
    """(P,) 2-norms, in one call and without a wait."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(parameters))])


def overreach(
    before: Tensor, after: Tensor, reach: Mapping[str, tuple[float, float]], names: Sequence[str]
) -> tuple[str, float] | None:
    """The parameter whose length changed most beyond its optimizer's reach, and by how many times; None where all kept within. No
    vector's length changes by more than the length of what was added. `reach`: by name, (length, share of the present length)."""
    room = torch.tensor([reach.get(name, (math.inf, 0.0)) for name in names])
    old, new = before.cpu(), after.cpu()
    ratio = (new - old).abs() / (room[:, 0] + (room[:, 1] + LENGTH_ROUNDING) * old)
    worst = int(torch.where(ratio.isnan(), math.inf, ratio).argmax())
    share = float(ratio[worst])
    return None if share <= 1.0 else (names[worst], share)


# Operators that the dispatcher sees by themselves: (arguments, output) to ratio. RMS norm is seen as a function (guard/checksum):
# where there is no fused kernel the dispatcher sees only its pieces.
LAWS: dict[Any, Callable[[Sequence[Any], Tensor], Tensor]] = {
    aten._softmax.default: lambda a, y: softmax_ratio(a[0], y, a[1]),
    aten._log_softmax.default: lambda a, y: log_softmax_ratio(a[0], y, a[1]),
    aten._softmax_backward_data.default: lambda a, dx: softmax_backward_ratio(a[0], a[1], dx, a[2]),
    aten._log_softmax_backward_data.default: lambda a, dx: log_softmax_backward_ratio(
        a[0], a[1], dx, a[2]
    ),
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
