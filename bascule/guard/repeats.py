"""The same batch at the same weights, again and again: all answers must be one.

The closing examination computes a few batches many times over for its count of checked products. Held against each other the answers cost
nothing more, and show what no checksum covers: any operator that errs now and then. Answers that differ are not wrong for that, where a chip adds
up in another order each time; then the referee computes the batch once, and whichever lies beyond the measured noise is the wrong one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bascule.guard.noise import Difference, NoiseFloor
from bascule.guard.proposal import Recomputer


@dataclass
class _Held:
    first: Any
    right: Any = None


class Repeats:
    """Of one stepper, whose weights stay while this lives."""

    def __init__(self, stepper: Recomputer, floor: NoiseFloor) -> None:
        self.stepper = stepper
        self.floor = floor
        self._held: dict[int, _Held] = {}

    def wrong_one(self, place: int, proposal: Any) -> tuple[Any, Difference] | None:
        """The wrong one of the batch's first answer and this, with by how much; None while they agree. `place` numbers the batches; a
        batch's step may differ from answer to answer."""
        if place not in self._held:
            grads = {n: grad.detach().to("cpu", copy=True) for n, grad in proposal.grads.items()}
            self._held[place] = _Held(dataclasses.replace(proposal, grads=grads))
            return None
        held = self._held[place]
        if (held.first.loss, held.first.grad_norm) == (proposal.loss, proposal.grad_norm):
            return None
        suspects = [proposal]
        if held.right is None:
            held.right = self.stepper.recompute(held.first.batch, self.floor.referee, 0)
            suspects.append(held.first)
        for one in suspects:
            found = self.floor.compare(one, held.right, self.stepper)
            if not found.agrees:
                del self._held[place]
                return one, found
        return None
