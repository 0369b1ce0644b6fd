"""How wrong is a number? Scale-free errors, signed gain, measured noise floors, checksum bounds: the one place for tolerances.

Every error is relative to its tensor's own size, so that a gradient of 1e-5 is judged as strictly as a logit. Bias is judged
apart from noise, because bias accumulates over layers and steps while noise averages (DESIGN section 7). Nothing here is a
fixed 1e-3: a bound is either the dtype's unit roundoff carried through the operation, or the measured response to a
perturbation of one unit in the last place.

Used by qualify (is this operator right?), guard (is this step right?) and fallback (is this the same run?).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bascule import draws


@dataclass(frozen=True)
class Tolerance:
    """What a dtype may do when it is right.

    `unit` is the unit roundoff (half the gap between 1 and the next number). `gain` is the bar on signed gain: an effect
    size, not a z-score (a correct bf16 sigmoid shows 4e-5 with z = 25). `margin` and `tail_margin` multiply the measured
    noise floor of RMS and largest error.
    """

    unit: float
    gain: float
    margin: float
    tail_margin: float


# One table for all rooms. Gain for bf16 from guard.md 6.1 (1e-4 is safe, a 0.2 % gain or truncation is 20 times above);
# fp32 bars leave room for a different summation order over some thousand terms and nothing more.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(unit=2.0**-53, gain=1e-13, margin=8.0, tail_margin=8.0),
    torch.float32: Tolerance(unit=2.0**-24, gain=1e-6, margin=8.0, tail_margin=8.0),
    torch.float16: Tolerance(unit=2.0**-11, gain=5e-5, margin=2.0, tail_margin=4.0),
    torch.bfloat16: Tolerance(unit=2.0**-8, gain=2e-4, margin=2.0, tail_margin=4.0),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The table's row. Raises KeyError for dtypes that hold no rounded numbers (integers, bool) or that nobody measured."""
    return TOLERANCES[dtype]


@dataclass(frozen=True)
class Comparison:
    """One tensor held against its reference, in float64. All errors are relative to the reference's own RMS.

    `rms`: RMS(error) / RMS(reference). `tail`: largest |error| / RMS(reference). `gain`: regression of error on reference
    (0 when unbiased, 1 when doubled, -1 when zeroed). `gain_z`: its z-score. `nonfinite`: places where exactly one of the
    two is finite, or both are not and differ; such places are left out of the other figures and always count as an error.
    """

    rms: float
    tail: float
    gain: float
    gain_z: float
    nonfinite: int
    count: int


def compare(measured: Tensor, reference: Tensor) -> Comparison:
    """Hold `measured` against `reference` (same shape, any float dtypes and devices). Raises ValueError on unequal shapes."""
    if measured.shape != reference.shape:
        raise ValueError(
            f"compare: shapes differ, {tuple(measured.shape)} against {tuple(reference.shape)}"
        )
    a = measured.detach().to("cpu", torch.float64).reshape(-1)
    b = reference.detach().to("cpu", torch.float64).reshape(-1)
    error, nonfinite = a - b, 0
    largest = _largest(error)
    if not math.isfinite(largest):  # rare, so the dearer count of what disagrees waits for it
        nonfinite = nonfinite_mismatches(a, b)
        both = torch.isfinite(a) & torch.isfinite(b)
        b, error = b[both], error[both]
        largest = _largest(error)
    if b.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, 0.0, nonfinite, 0)
    top = _largest(b)
    scale = _rms(b, top)
    gain, z = _gain(error, b, top)
    return Comparison(
        rms=_ratio(_rms(error, largest), scale),
        tail=_ratio(largest, scale),
        gain=gain,
        gain_z=z,
        nonfinite=nonfinite,
        count=b.numel(),
    )


def scale_free_error(measured: Tensor, reference: Tensor) -> float:
    """|measured - reference| / |reference| in the 2-norm; inf when they disagree about what is finite, or about all zeros."""
    found = compare(measured, reference)
    return math.inf if found.nonfinite else found.rms


def nonfinite_mismatches(measured: Tensor, reference: Tensor) -> int:
    """How many places disagree about being finite, or hold different infinities. Two NaN agree."""
    a, b = measured.detach().cpu().reshape(-1), reference.detach().cpu().reshape(-1)
    same = (torch.isfinite(a) & torch.isfinite(b)) | (torch.isnan(a) & torch.isnan(b))
    same |= torch.isinf(a) & torch.isinf(b) & (torch.signbit(a) == torch.signbit(b))
    return int((~same).sum())


def rounding_floor(
    reference: Tensor, dtype: torch.dtype, *, accumulate_terms: int = 1
) -> Comparison:
    """The error of an ideal chip: the exact result (float64 `reference`) rounded once to `dtype`.

    `accumulate_terms` is the length of the sums behind each element: they are accumulated in fp32 (fp64 for fp64), which
    adds about sqrt(terms) roundings of the accumulator to what the output's rounding costs.
    """
    once = compare(reference.to(dtype), reference)
    unit = TOLERANCES[torch.float64 if dtype == torch.float64 else torch.float32].unit
    accumulated = unit * math.sqrt(max(accumulate_terms, 1))
    return Comparison(
        rms=math.hypot(once.rms, accumulated),
        tail=once.tail + 6.0 * accumulated,
        gain=once.gain,
        gain_z=once.gain_z,
        nonfinite=once.nonfinite,
        count=once.count,
    )


def verdict(found: Comparison, floor: Comparison, dtype: torch.dtype) -> str | None:
    """None when `found` is what a right chip does given the noise `floor`; otherwise the reason in a few words.

    Bias first, then RMS, then the tail: truncation and a 0.2 % gain hide inside a loose RMS bound, and a few wrong elements
    hide inside RMS and gain alike (guard.md 6.1). The gain bar never lies under what the number of elements can resolve.
    """
    allowed = tolerance(dtype)
    if found.nonfinite:
        return f"{found.nonfinite} non-finite values where the reference is finite, or the reverse"
    gain_bar = abs(floor.gain) + max(allowed.gain, 6.0 * floor.rms / math.sqrt(max(found.count, 1)))
    if abs(found.gain) > gain_bar:
        return f"signed gain {found.gain:+.2e} (z {found.gain_z:.0f}), allowed {gain_bar:.1e}"
    if found.rms > allowed.margin * floor.rms:
        return f"RMS error {found.rms:.2e}, allowed {allowed.margin * floor.rms:.2e} ({allowed.margin:g} times the noise floor)"
    if found.tail > allowed.tail_margin * floor.tail:
        return f"largest error {found.tail:.2e}, allowed {allowed.tail_margin * floor.tail:.2e} ({allowed.tail_margin:g} times the floor)"
    return None


# --- measured noise floors ------------------------------------------------------------------------------------------------


def perturb_one_ulp(tensor: Tensor, key: int, narrower: torch.dtype | None = None) -> Tensor:
    """Every element moved to its next or previous representable number, the direction drawn from `key`. Same dtype, on CPU.

    Zeros and non-finite elements stay: a zero's neighbour is a subnormal, which would test flushing, not rounding. fp32 that is read
    through bf16 (`narrower`) moves by bf16's unit: fp32's own would be lost in the rounding.
    """
    source = tensor.detach().cpu()
    count = source.numel()
    up = torch.from_numpy(
        (draws.bits(key, np.arange(count, dtype=np.uint64)) & np.uint64(1)).astype(np.bool_)
    ).reshape(source.shape)
    if narrower == torch.bfloat16 and source.dtype == torch.float32:
        return _moved_as_bf16(source, up)
    toward = torch.where(up, math.inf, -math.inf).to(source.dtype)
    moved = torch.nextafter(source, toward)
    return torch.where(torch.isfinite(source) & (source != 0), moved, source)


def _moved_as_bf16(source: Tensor, up: Tensor) -> Tensor:
    """bf16 is the upper half of fp32: one in its last place is 2^16 in fp32's, towards zero or away from it."""
    size = source.abs().contiguous().view(torch.int32)
    moved = (size + torch.where(up, 2**16, -(2**16)).int()).view(torch.float32).copysign(source)
    stays = ~torch.isfinite(source) | ~torch.isfinite(moved) | (size < 2**16)
    return torch.where(stays, source, moved)


# --- checksums ------------------------------------------------------------------------------------------------------------

CHECKSUM_MARGIN = 4.0
CHECKSUM_FLOOR = 1e-18


def checksum_bound(
    row_norms: Tensor,
    matrix_norm: Tensor,
    terms: int,
    columns: int,
    output_norms: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """How far the sum of a product's row may lie from its checksum, per row: `4 * 2^-24 * (sqrt k + sqrt n) * |a_i| * |W|_F + 1e-18`.

    `row_norms` (..., m) are the 2-norms of the left rows, `matrix_norm` (...,) the right matrix's Frobenius norm, `terms` k,
    `columns` n. Measured on 655,422 checks of real training: largest ratio 2.07 of 4 (feasibility.md 6). The floor is needed
    because rows of gradients at 1e-23 have a norm that underflows to 0.

    Half dtypes round each output once more: six standard deviations of that, from `output_norms` (..., m), are added. There
    only corruption above about 1 to 2 % of a row's norm is seen; the reason to prefer fp32 outputs where it matters.
    """
    unit = TOLERANCES[torch.float64 if dtype == torch.float64 else torch.float32].unit
    bound = (
        row_norms
        * matrix_norm.unsqueeze(-1)
        * (CHECKSUM_MARGIN * unit * (math.sqrt(terms) + math.sqrt(columns)))
    )
    if dtype in (torch.float16, torch.bfloat16) and output_norms is not None:
        bound = bound + output_norms * (6.0 * TOLERANCES[dtype].unit / math.sqrt(3.0))
    return bound + CHECKSUM_FLOOR


# --- helpers --------------------------------------------------------------------------------------------------------------


def _largest(x: Tensor) -> float:
    """Largest magnitude; NaN or inf when there is one."""
    return float(x.abs().max()) if x.numel() else 0.0


def _rms(x: Tensor, top: float) -> float:
    """RMS without overflow or underflow of the squares: gradients of 1e-200 and logits of 1e200 alike. `top` is `_largest(x)`."""
    return top * math.sqrt(float((x / top).square().mean())) if top > 0.0 else 0.0


def _ratio(error: float, scale: float) -> float:
    if scale > 0.0:
        return error / scale
    return 0.0 if error == 0.0 else math.inf


def _gain(error: Tensor, reference: Tensor, top: float) -> tuple[float, float]:
    """Signed gain and its z-score; the standard error allows unequal noise (HC0), as rounding noise grows with the value."""
    if top == 0.0:
        return 0.0, 0.0
    ref, err = reference / top, error / top
    total = float(ref.square().sum())
    gain = float((ref * err).sum()) / total
    spread = math.sqrt(float((ref * (err - gain * ref)).square().sum())) / total
    if spread == 0.0:
        return gain, 0.0 if gain == 0.0 else math.copysign(math.inf, gain)
    return gain, gain / spread
