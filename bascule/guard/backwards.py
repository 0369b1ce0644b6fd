"""Since when does this batch look abnormal? The same batch with older weights, by bisection over the snapshots on the disk.

Asked once the chip is cleared: it computes the step as the referee does, so what is wrong came before it. With the weights of the
newest certified snapshot the batch is either abnormal too (then it is the batch) or normal (then the weights went wrong since). Weights
that take an earlier batch badly as well are too old to say: training has come far since. Of the snapshots between, each
halves what is left: with k of them log2(k) + 2 forward and backward passes, where computing the steps again takes all of them. It names an interval, not a step: the rollback that follows computes those steps again and finds the first
that differs (hindsight).

What it cannot tell: whether the optimisation went that way or a chip erred there. Only the steps computed again tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bascule.accelerators.base import Accelerator
from bascule.errors import SnapshotError
from bascule.guard.proposal import FIRST_REPLAY, Recomputer, StepProposal
from bascule.records import Replay


@dataclass(frozen=True)
class Older:
    """A snapshot of this phase: the weights after `step`, read when they are asked for (raises SnapshotError)."""

    step: int
    weights: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Since:
    """`normal`: the newest snapshot asked with whose weights the batch looks normal, `abnormal`: the oldest with whose it does not.
    None for `normal`: with none; None for `abnormal`: with none but the present weights."""

    normal: int | None
    abnormal: int | None
    replays: tuple[Replay, ...]

    def told(self, step: int) -> str:
        if self.normal is None:
            return f"with the weights after step {self.abnormal} it is abnormal too, and an earlier batch is not"
        return (
            f"with the weights after step {self.normal} this batch is normal, with those after step "
            f"{step - 1 if self.abnormal is None else self.abnormal} it is not"
        )


def since_when(
    batch: Any,
    control: Any,
    stepper: Recomputer,
    referee: Accelerator,
    older: Sequence[Older],
    looks_normal: Callable[[StepProposal], bool],
) -> Since | None:
    """`older`: oldest first; `control`: an earlier batch that trained well. None when no snapshot can say."""
    asking = _Asking(stepper, referee, looks_normal)
    left = list(older)
    while left and not asking.takes_well(left[0], control, "an earlier batch"):
        del left[0]
    if not left:
        return None
    if not asking.takes_well(left[0], batch, "this batch"):
        return Since(None, left[0].step, tuple(asking.replays))
    low, high = 0, len(left)
    while high - low > 1:
        middle = (low + high) // 2
        fine = asking.takes_well(left[middle], batch, "this batch")
        if fine is None:
            del left[middle]
            high -= 1
        elif fine:
            low = middle
        else:
            high = middle
    abnormal = left[high].step if high < len(left) else None
    return Since(left[low].step, abnormal, tuple(asking.replays))


class _Asking:
    """Computes batches with older weights on the referee, and writes down every answer."""

    def __init__(
        self,
        stepper: Recomputer,
        referee: Accelerator,
        looks_normal: Callable[[StepProposal], bool],
    ) -> None:
        self.stepper = stepper
        self.referee = referee
        self.looks_normal = looks_normal
        self.replays: list[Replay] = []

    def takes_well(self, one: Older, batch: Any, which: str) -> bool | None:
        """None when the snapshot cannot be read."""
        try:
            weights = one.weights()
        except SnapshotError as error:
            self._write(one, False, f"it cannot be read: {error}")
            return None
        proposal = self.stepper.recompute(batch, self.referee, FIRST_REPLAY, None, weights)
        fine = self.looks_normal(proposal)
        self._write(one, fine, f"{which} is {'normal' if fine else 'abnormal'}: loss {proposal.loss:.4g}, gradient norm {proposal.grad_norm:.4g}")  # fmt: skip
        return fine

    def _write(self, one: Older, fine: bool, detail: str) -> None:
        where = f"referee, with the weights after step {one.step}"
        self.replays.append(Replay(where=where, agrees=fine, error=None, bound=None, detail=detail))
