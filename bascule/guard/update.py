"""Did the optimizer's update come out right? Gradients can be perfect and the weights still wrong: commit runs on the chip too.

Before a sampled step commits, the referee works out the weights that the commit should leave; the next step compares. Judged is
the change of each tensor, not the tensor: an update is some thousandth of its weight, so a lost one would hide in a comparison of
weights. The noise floor is the update's response to gradients moved by one unit in the last place (Muon's orthogonalisation
magnifies noise in weak directions, so no fixed bound would fit all tensors).

Between two updates nobody writes to the weights: guard/bits holds them to that at every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bascule import draws, numerics
from bascule.accelerators.base import Accelerator
from bascule.guard.proposal import Recomputer

MARGIN = 8.0
PERTURBATIONS = 2


@dataclass(frozen=True)
class Expected:
    """The weights before a commit, those that it should leave, and per tensor the noise that the change may show. On the CPU."""

    step: int
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    noise: dict[str, float]


@dataclass(frozen=True)
class WrongUpdate:
    step: int
    tensor: str
    error: float
    bound: float

    def __str__(self) -> str:
        return f"the update of step {self.step} changed {self.tensor} wrongly: error {self.error:.2e} of the change, allowed {self.bound:.1e}"


def expect(proposal: Any, stepper: Recomputer, referee: Accelerator, *, measure: bool) -> Expected:
    """Work out on `referee` what committing `proposal` should do. Call it before the commit.

    `measure` the noise too (two more updates) unless chip and referee run the same kernels, where only rounding is allowed.
    """
    after = _cpu(stepper.rehearse(proposal, referee))
    before = {
        name: tensor for name, tensor in _cpu(stepper.model.state_dict()).items() if name in after
    }
    noise = dict.fromkeys(after, 0.0)
    for repeat in range(PERTURBATIONS if measure else 0):
        grads = {
            name: numerics.perturb_one_ulp(
                grad, draws.key(proposal.step, "guard.update", place, repeat)
            ).to(grad.device)
            for place, (name, grad) in enumerate(proposal.grads.items())
        }
        moved = _cpu(stepper.rehearse(dataclasses.replace(proposal, grads=grads), referee))
        for name, tensor in moved.items():
            change = after[name].double() - before[name].double()
            noise[name] = max(
                noise[name],
                numerics.scale_free_error(tensor.double() - before[name].double(), change),
            )
    return Expected(proposal.step, before, after, noise)


def check(expected: Expected, model: nn.Module) -> WrongUpdate | None:
    """Hold the model's present weights, right after the commit, against what was expected; the worst tensor, or None."""
    return hold(expected, model.state_dict())


def hold(expected: Expected, weights: Mapping[str, Tensor]) -> WrongUpdate | None:
    """As `check`, with the weights by name."""
    worst: tuple[float, WrongUpdate] | None = None
    for name, now in _cpu(weights).items():
        if name not in expected.after or torch.equal(now, expected.after[name]):
            continue
        before = expected.before[name].double()
        error = numerics.scale_free_error(
            now.double() - before, expected.after[name].double() - before
        )
        bound = MARGIN * max(expected.noise[name], _rounding(expected, name))
        if not error <= bound and (worst is None or error / bound > worst[0]):
            worst = error / bound, WrongUpdate(expected.step, name, error, bound)
    return None if worst is None else worst[1]


def _rounding(expected: Expected, name: str) -> float:
    """Adding a small change to a weight rounds the sum: the change carries a rounding of the weight's size."""
    after = expected.after[name]
    if not after.is_floating_point():
        return 0.0
    change = (after.double() - expected.before[name].double()).norm().item()
    return (
        numerics.tolerance(after.dtype).unit * after.double().norm().item() / change
        if change
        else 0.0
    )


def _cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
