"""How exact are a step's products? A few outputs of each are computed again in double, term by term, on the host.

A checksum holds a row to the most that right rounding can do, so an error of a few roundings in every output stays under its bound for
ever, and trains on. Its average does not: held to what adding one term after the other in fp32 costs (no right chip adds less exactly),
some ten thousand outputs a step tell an accumulator of 18 mantissa bits from one of 23 in a single step, where one output cannot.

    sum of k terms t, partial sums s:  mean square error  <=  u^2 / 3 (s_1^2 + ... + s_k^2 + c^2),   u = 2^-24

because a rounding moves a number x by at most u |x|, evenly spread. Chips add in other orders, which have other partial sums: the largest
of several is taken, and at least what terms without order come to, k/2 of the sum of t^2. Products in fp32 alone: half types round
each output once more, and nothing finer is left to see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bascule import numerics

SIDE, TERMS = 8, 16_384
"""Up to SIDE x SIDE outputs of a product, fewer where sums are long: about TERMS terms in all."""

ONE, ALL = 4.0, 1.5
"""Allowed, as factors of the root mean square above: in one product, and in all of a step together. Clean products of training show 0.9 at
most and 0.45 together; a chip whose outputs are off by two units in the last place (`sim:jitter`) 1.9 and 0.65."""

EVERY = 4
"""One product in so many is looked at, others at each turn: some forty of a step are enough, and each costs as much as its checksum."""

LANES = 8
"""Vector units add every eighth term by itself."""

FLUSHED = 2.0**-126
"""A chip may take what is smaller for zero: each term, and each sum."""


@dataclass(frozen=True)
class Sample:
    """Of C = alpha A B + addend: some rows of A, some columns of B (as rows), and what the chip made of them. Copies, on the chip."""

    left: Tensor
    right: Tensor
    output: Tensor
    addend: Tensor | None
    alpha: float


def sample(
    left: Tensor, right: Tensor, output: Tensor, addend: Tensor | None = None, *, alpha: float = 1, turn: int = 0
) -> Sample | None:  # fmt: skip
    """Shapes as in checksum.product_ratio; `turn` says which outputs. None where nothing is to be said of these types."""
    if not left.dtype == right.dtype == output.dtype == torch.float32 or not output.numel():
        return None
    addend = None if addend is None else addend.expand(output.shape)
    if output.dim() == 3:
        at = turn % output.shape[0]
        left, right, output = left[at], right[at], output[at]
        addend = None if addend is None else addend[at]
    side = max(2, min(SIDE, math.isqrt(TERMS // max(1, left.shape[-1]))))
    rows, columns = (_some(size, side, turn) for size in output.shape)
    return Sample(
        left=left.detach()[rows].clone(),
        right=right.detach()[:, columns].T.clone(),
        output=output.detach()[rows, columns].clone(),
        addend=None if addend is None else addend.detach()[rows, columns].clone(),
        alpha=alpha,
    )


@torch.no_grad()
def squares(one: Sample) -> Tensor:
    """(outputs,) squared errors over the mean square allowed, on the host. Outputs that are not finite are passed over: checksums name
    those. Waits for the chip."""
    left, right, found = (x.to("cpu", torch.float64) for x in (one.left, one.right, one.output))
    added = torch.zeros((), dtype=torch.float64)
    if one.addend is not None:
        added = one.addend.to("cpu", torch.float64)
    terms = (left.unsqueeze(1) * right).mul_(one.alpha)
    reach, total = _partial_sums(terms, added)
    error = found - total - added
    unit = numerics.tolerance(torch.float32).unit
    allowed = (reach + found.square()) * (unit * unit / 3.0)
    ratio = error.square_() / (allowed + (terms.shape[-1] * FLUSHED) ** 2)
    return torch.where(torch.isfinite(ratio), ratio, 0.0).flatten()


def ratio_of_one(found: Tensor) -> float:
    """A product's root mean square over what one product is allowed."""
    return float(found.mean().sqrt()) / ONE


def ratio_of_all(found: Sequence[Tensor]) -> float:
    """All products' of a step over what they are allowed together."""
    return float(torch.cat(list(found)).mean().sqrt()) / ALL if found else 0.0


def _partial_sums(terms: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest sum of squares of the partial sums of several orders, the whole sum) of the last dimension's terms: first to last,
    last to first, in lanes, and without order. `added` may stand at the beginning of a sum or at its end."""
    count = terms.shape[-1]
    reach = terms.square().sum(-1) * (count / 2)
    whole = count - count % LANES
    lanes = terms[..., :whole].reshape(*terms.shape[:-1], whole // LANES, LANES).cumsum(-2)
    reach = torch.maximum(reach, lanes.square_().sum((-2, -1)))
    forward = terms.cumsum(-1)
    total = forward[..., -1].clone()
    for sums in (total.unsqueeze(-1) - forward, forward):
        sums = sums.abs_().add_(added.abs().unsqueeze(-1))
        reach = torch.maximum(reach, sums.square_().sum(-1))
    return reach, total


def _some(size: int, most: int, turn: int) -> slice:
    """Up to `most` of `size` places, evenly spaced; the next turn begins one place further."""
    step = max(1, size // most)
    start = turn % step
    return slice(start, min(size, start + most * step), step)
