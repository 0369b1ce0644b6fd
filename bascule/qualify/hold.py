"""Hold a chip's answer to one operator call against the truth: fp64 on the CPU, within a noise floor measured for that call.

The floor of a call is the largest of three errors, each against the fp64 answer: the ideal chip's (accumulate in fp32, round
once), this machine's CPU's at the call's own type, and the CPU's when every input moves by one unit in the last place. A right
chip of another make rounds in another order and lands among these; what lies `numerics.Tolerance` times outside is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bascule import draws, numerics
from bascule.numerics import Comparison
from bascule.qualify.context import Measured
from bascule.qualify.trace import Call, Moved

CPU = torch.device("cpu")
# Outputs whose order two right chips may choose differently (`sorted=False`): held against each other after sorting.
_UNORDERED = ("topk",)


@dataclass(frozen=True)
class Miss:
    """One output that is not what a right chip gives. `found` is None where the answer must be exact (integers, booleans).
    `differentiated`: the output is a gradient of the call, not a value of it."""

    call: Call
    output: int
    why: str
    found: Comparison | None
    floor: Comparison | None
    differentiated: bool = False

    def measured(self) -> Measured:
        result: Measured = {
            "operator": self.call.name,
            "signature": self.call.signature,
            "output": self.output,
            "calls": self.call.count,
        }
        if self.found and self.floor:
            result |= {
                "gain": self.found.gain,
                "gain_z": self.found.gain_z,
                "rms": self.found.rms,
                "tail": self.found.tail,
                "nonfinite": self.found.nonfinite,
                "floor_rms": self.floor.rms,
                "floor_tail": self.floor.tail,
            }  # fmt: skip
        return result


@dataclass(frozen=True)
class Held:
    """What was held: how many outputs, the worst ratio of RMS error to its floor, and what missed."""

    outputs: int
    worst_ratio: float
    worst: str
    misses: tuple[Miss, ...]


def hold_call(
    call: Call,
    answer: Sequence[Tensor],
    reference: Sequence[Tensor],
    native: Sequence[Tensor],
    moved: Sequence[Tensor],
) -> Held:
    """`answer` from the chip, `reference` in fp64, `native` from the CPU at the call's own type, `moved` the same with every
    input moved by one ulp. Four lists of the same outputs."""
    misses: list[Miss] = []
    worst, where = 0.0, ""
    for place, (got, exact, plain, nudged) in enumerate(
        zip(answer, reference, native, moved, strict=True)
    ):
        if call.base_name in _UNORDERED:
            got, exact, plain, nudged = (_in_order(value) for value in (got, exact, plain, nudged))
        if got.shape != plain.shape:
            shapes = f"shape {tuple(got.shape)}, expected {tuple(plain.shape)}"
            misses.append(Miss(call, place, shapes, None, None))
            continue
        if not plain.is_floating_point():
            if not torch.equal(got.to(CPU), plain):
                wrong = int((got.to(CPU) != plain).sum())
                misses.append(
                    Miss(
                        call,
                        place,
                        f"{wrong} of {plain.numel()} integers differ, allowed 0",
                        None,
                        None,
                    )
                )
            continue
        found = numerics.compare(got, exact)
        floor = noise_floor(exact, plain, nudged)
        why = numerics.verdict(found, floor, plain.dtype)
        if why:
            misses.append(Miss(call, place, why, found, floor))
        ratio = found.rms / floor.rms if floor.rms else 0.0
        if ratio > worst:
            worst, where = ratio, call.name
    return Held(len(answer), worst, where, tuple(misses))


def noise_floor(exact: Tensor, plain: Tensor, nudged: Tensor) -> Comparison:
    """The largest, figure by figure, of what an ideal chip, this CPU and a one-ulp nudge miss `exact` by."""
    ideal = numerics.rounding_floor(exact, plain.dtype)
    return widest(ideal, numerics.compare(plain, exact), numerics.compare(nudged, plain))


def widest(*floors: Comparison) -> Comparison:
    return replace(
        floors[0],
        rms=max(floor.rms for floor in floors),
        tail=max(floor.tail for floor in floors),
        gain=max((floor.gain for floor in floors), key=abs),
        nonfinite=0,
    )


def nudge(seed: int, call: Call) -> Moved:
    """The call's arguments on the CPU with every float input moved by one ulp up or down."""
    key = draws.key(seed, f"qualify.nudge/{call.signature}")
    return call.place(CPU, change=lambda leaf: numerics.perturb_one_ulp(leaf, key))


def _in_order(values: Tensor) -> Tensor:
    return values.sort(dim=-1).values if values.dim() else values


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bytes: NaN equals the same NaN, 0 is not -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(
        torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    )
