"""Where did it go wrong? A launch that repeats an earlier launch's steps finds the first one that comes out differently.

A rollback recomputes everything since the last certified snapshot, with every step checked. On the same kernels a right step has
the same loss and gradient norm to the last bit, so the first step that differs is where the earlier launch was spoilt: its
gradients if the norm differs but the loss does not, else its forward pass, or the update before it. This is the bisection between
alarm and certified snapshot, at no cost beyond the recomputation that the rollback does anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bascule.records import AnyRecord, StepStats


@dataclass(frozen=True)
class Earlier:
    """What an earlier launch recorded of a step."""

    loss: float
    grad_norm: float
    attempt: int
    pool: str | None


def earlier_steps(records: Iterable[AnyRecord]) -> dict[int, Earlier]:
    """Step -> what the latest launch that committed it recorded."""
    return {
        record.step: Earlier(record.loss, record.grad_norm, record.attempt, record.pool)
        for record in records
        if isinstance(record, StepStats)
    }


def led_to(records: Iterable[AnyRecord], step: int) -> list[StepStats]:
    """The committed steps from which the weights after `step` came, oldest first. A rollback voids the steps it goes behind."""
    line: list[StepStats] = []
    for record in records:
        if isinstance(record, StepStats):
            while line and line[-1].step >= record.step:
                line.pop()
            line.append(record)
    return [one for one in line if one.step <= step]


def first_difference(
    earlier: Mapping[int, Earlier], step: int, loss: float, grad_norm: float
) -> str | None:
    """What differs at `step`, in words; None when the step is new or came out the same."""
    before = earlier.get(step)
    if before is None or (before.loss, before.grad_norm) == (loss, grad_norm):
        return None
    where = f"launch {before.attempt} on '{before.pool}'"
    if before.loss != loss:
        return f"step {step} now has loss {loss:.9g}, in {where} it had {before.loss:.9g}: its forward pass or the update of step {step - 1} was wrong there"
    return f"step {step} has the same loss as in {where} but gradient norm {grad_norm:.9g} instead of {before.grad_norm:.9g}: its backward pass was wrong there"
