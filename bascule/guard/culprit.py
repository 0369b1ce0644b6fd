"""Which operator is it? A step is computed once more on the chip, and each of its operators asked again on the referee, with the inputs it had here.

So the first one that answers differently is a cause and not a consequence. Asked only when a fault repeats and no checksum has named a
product: a whole step is copied to the referee for it. Two answers agree within the referee's own response to inputs moved by one unit
in the last place, as everywhere; equal bits need no measuring. Operators that draw random numbers, that only rename memory, or that the
referee does not have are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from bascule import draws, numerics
from bascule.accelerators.base import Accelerator, Work
from bascule.dispatch import OperatorMode
from bascule.guard.checksum import parameter_names
from bascule.guard.proposal import Recomputer, StepBatch

MARGIN = 8.0
RESPONSES = 4
"""Moved inputs that a floor is made of. An innocent operator must not be named: more than an audit takes."""


@dataclass(frozen=True)
class Culprit:
    """An operator that is wrong on equal inputs. `order` counts all operators of the step from 0."""

    operator: str
    order: int
    name: str
    error: float
    bound: float

    def __str__(self) -> str:
        where = f" on {self.name}" if self.name else ""
        how = "not finite where it must be" if math.isinf(self.error) else f"error {self.error:.2e}, allowed {self.bound:.1e}"  # fmt: skip
        return f"{self.operator} #{self.order}{where}: {how}"


def first_wrong_operator(
    stepper: Recomputer, batch: StepBatch, attempt: int, referee: Accelerator
) -> Culprit | None:
    """None where every operator that could be asked is right for the inputs it had."""
    modes: list[_Asking] = []

    def watch(step: int, phase: str, model: Any) -> Any:
        modes.append(_Asking(referee, parameter_names(model), step))
        return modes[-1]

    stepper.recompute(batch, None, attempt, watch)
    return next((mode.found for mode in modes if mode.found is not None), None)


class _Asking(OperatorMode):
    def __init__(self, referee: Accelerator, names: Mapping[int, str], step: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.referee, self.names, self.step = referee, names, step
        self.found: Culprit | None = None
        self._count = -1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._count += 1
        kwargs = kwargs or {}
        if self.found is not None or not _can_be_asked(func):
            return func(*args, **kwargs)
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            had = tree_map(_kept, (args, kwargs))
        output = func(*args, **kwargs)
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            self.found = self._ask(func, had, output, args)
        return output

    def _ask(self, func: Any, had: Any, output: Any, args: Any) -> Culprit | None:
        here = _floats(tree_map(_kept, output))
        try:
            right = self._there(func, had)
        except (RuntimeError, TypeError):  # it has no such operator, or not for these inputs
            return None
        if len(here) != len(right) or all(map(torch.equal, here, right)):
            return None
        floors = [self._response(func, had, right, turn) for turn in range(RESPONSES)]
        for place, (one, other) in enumerate(zip(here, right, strict=True)):
            if one.shape != other.shape:
                continue
            found, unit = numerics.compare(one, other), numerics.tolerance(one.dtype).unit
            bound = MARGIN * max(unit, *(floor[place] for floor in floors))
            error = math.inf if found.nonfinite else found.rms
            if error > bound:
                return Culprit(str(func).removeprefix("aten."), self._count, self._name(args), error, bound)  # fmt: skip
        return None

    def _there(self, func: Any, had: Any) -> list[Tensor]:
        args, kwargs = tree_map(self._placed, had)
        with self.referee.session(Work("train", self.step, 1)), torch.no_grad():
            return _floats(tree_map(_kept, func(*args, **kwargs)))

    def _placed(self, leaf: Any) -> Any:
        """A copy, for operators that write into what they are given."""
        if isinstance(leaf, torch.device):
            return self.referee.device
        return self.referee.to_device(leaf.clone()) if isinstance(leaf, Tensor) else leaf

    def _response(self, func: Any, had: Any, right: list[Tensor], turn: int) -> list[float]:
        key, place = draws.key(self.step, "guard.culprit", self._count, turn), iter(range(10**6))

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            return numerics.perturb_one_ulp(leaf, draws.key(key, "moved", next(place)))

        again = self._there(func, tree_map(moved, had))
        return [numerics.compare(one, other).rms for one, other in zip(again, right, strict=True)]

    def _name(self, args: Any) -> str:
        tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return next((self.names[one.data_ptr()] for one in tensors if one.data_ptr() in self.names), "")  # fmt: skip


def _can_be_asked(func: Any) -> bool:
    return not (getattr(func, "is_view", False) or torch.Tag.nondeterministic_seeded in func.tags)


def _kept(leaf: Any) -> Any:
    """On the host, with its strides: an operator may be wrong for a layout only."""
    if not isinstance(leaf, Tensor):
        return leaf
    source = leaf.detach()
    if any(stride == 0 for stride in leaf.stride()):  # expanded: several places are one
        return source.to("cpu", copy=True)
    host = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
    return host.copy_(source)


def _floats(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.is_floating_point()]
