"""Do two computations of one step agree? Within the step's own response to weights moved by one unit in the last place, worked out on the
referee, per tensor. On chips with equal kernels the errors are zero and nothing needs to be measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from bascule import draws, numerics
from bascule.accelerators.base import Accelerator
from bascule.config.training import Precision
from bascule.guard.proposal import FIRST_REPLAY, Recomputer, StepProposal
from bascule.model.precision import DTYPE, rounded


@dataclass(frozen=True)
class Measuring:
    """`perturbations`: (how many, by how many ulps): first the cheap floor; before an accusation the deep one, which also meets routing
    ties. `margin`: how many times its floor an error may be."""

    margin: float
    perturbations: tuple[tuple[int, int], ...]


MEASURING: dict[Precision, Measuring] = {
    "fp32": Measuring(8.0, ((2, 1), (6, 4))),
    "bf16": Measuring(4.0, ((2, 1), (8, 2))),
}
"""In bf16 one unit moves a gradient by some 10 %, so neither larger moves nor a wider margin may be afforded. Two right chips (products summed in
other orders, attention by other kernels) stayed within 1.3 times the deep floor (docs/guard.md)."""


@dataclass(frozen=True)
class Difference:
    """Two computations of one step, held together. `tensor` is the one furthest outside, or the furthest of all."""

    agrees: bool
    error: float
    bound: float
    tensor: str
    detail: str


class NoiseFloor:
    """The response of a whole step's gradients to weights moved by a few ulps, measured on the referee, lazily.

    Measuring costs some replays, so nothing is measured while computations agree bit for bit; a floor that was measured is
    kept for `keep_steps` and measured anew where it would decide.
    """

    def __init__(self, referee: Accelerator) -> None:
        self.referee = referee
        self._cache: tuple[int, int, dict[str, numerics.Comparison], numerics.Comparison] | None = (
            None
        )

    def compare(
        self, measured: StepProposal, right: StepProposal, stepper: Recomputer
    ) -> Difference:
        """`right` comes from the referee (or was shown to agree with it). The depth grows before the answer is `differs`."""
        if _bit_equal(measured, right):
            return Difference(True, 0.0, 0.0, "", "equal bit for bit")
        if not _same_finiteness(measured, right):
            return Difference(
                False,
                math.inf,
                0.0,
                "",
                f"one is finite, the other is not (loss {measured.loss} and {right.loss})",
            )
        answer = Difference(False, math.inf, 0.0, "", "not measured")
        for depth in range(len(MEASURING[stepper.precision].perturbations)):
            floors, loss_floor = self._floors(right, stepper, depth)
            answer = self._hold(measured, right, floors, loss_floor, stepper.precision)
            if answer.agrees:
                break
        return answer

    def _hold(
        self,
        measured: StepProposal,
        right: StepProposal,
        floors: Mapping[str, numerics.Comparison],
        loss_floor: numerics.Comparison,
        precision: Precision,
    ) -> Difference:
        margin, least = MEASURING[precision].margin, numerics.tolerance(DTYPE[precision]).unit
        excess, worst = -1.0, Difference(True, 0.0, 0.0, "", "")
        pairs = {**measured.grads, "loss": torch.tensor(measured.loss, dtype=torch.float64)}
        rights = {**right.grads, "loss": torch.tensor(right.loss, dtype=torch.float64)}
        for name, tensor in pairs.items():
            found = numerics.compare(tensor, rights[name])
            floor = loss_floor if name == "loss" else floors[name]
            dtype = right.grads[name].dtype if name in right.grads else torch.float32
            unit = max(least, numerics.tolerance(dtype).unit)
            bound, tail = margin * max(floor.rms, unit), margin * max(floor.tail, unit)
            ratio = math.inf if found.nonfinite else max(found.rms / bound, found.tail / tail)
            if ratio > excess:
                detail = f"{name}: error {found.rms:.2e} (largest {found.tail:.2e}), allowed {bound:.1e} ({tail:.1e})"
                excess, worst = ratio, Difference(ratio <= 1.0, found.rms, bound, name, detail)
        return worst

    def _floors(
        self, right: StepProposal, stepper: Recomputer, depth: int
    ) -> tuple[dict[str, numerics.Comparison], numerics.Comparison]:
        if self._cache is not None and self._cache[0] == right.step and self._cache[1] >= depth:
            return self._cache[2], self._cache[3]
        floors: dict[str, numerics.Comparison] = {}
        loss_floor = numerics.compare(torch.zeros(1), torch.zeros(1))
        repeats, ulps = MEASURING[stepper.precision].perturbations[depth]
        for repeat in range(repeats):
            with moved_weights(
                stepper.model,
                draws.key(right.step, "guard.floor", depth, repeat),
                ulps,
                stepper.precision,
            ):
                moved = stepper.recompute(right.batch, self.referee, FIRST_REPLAY)
            for name, grad in moved.grads.items():
                floors[name] = _larger(floors.get(name), numerics.compare(grad, right.grads[name]))
            loss_floor = _larger(
                loss_floor, numerics.compare(torch.tensor([moved.loss]), torch.tensor([right.loss]))
            )
        self._cache = (right.step, depth, floors, loss_floor)
        return floors, loss_floor


@contextmanager
def moved_weights(
    model: nn.Module, key: int, ulps: int, precision: Precision = "fp32"
) -> Iterator[None]:
    """Every weight moved by up to `ulps` units in the last place inside the block, and put back bit for bit after it: of its own type, or
    of the type in which the step's products read it."""
    narrowed = rounded(model)
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    units = [DTYPE[precision] if name in narrowed else p.dtype for name, p in model.named_parameters()]  # fmt: skip
    try:
        with torch.no_grad():
            for place, (parameter, value) in enumerate(kept):
                moved = value
                for nudge in range(ulps):
                    moved = numerics.perturb_one_ulp(
                        moved, draws.key(key, "weights", place, nudge), units[place]
                    )
                parameter.copy_(moved)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _bit_equal(one: StepProposal, other: StepProposal) -> bool:
    return one.loss == other.loss and all(
        torch.equal(grad, other.grads[name].to(grad.device)) for name, grad in one.grads.items()
    )


def _same_finiteness(one: StepProposal, other: StepProposal) -> bool:
    return math.isfinite(one.loss) == math.isfinite(other.loss) and math.isfinite(
        one.grad_norm
    ) == math.isfinite(other.grad_norm)


def _larger(one: numerics.Comparison | None, other: numerics.Comparison) -> numerics.Comparison:
    return other if one is None or other.rms > one.rms else one
