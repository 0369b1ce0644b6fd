"""Learning-rate factors: linear warm-up, then linear decay. A factor multiplies every group's peak rate."""

from __future__ import annotations


def linear(index: int, steps: int, *, warmup: int, final: float) -> float:
    """Factor of step `index` (from 0) of `steps`.

    Rises from 1/warmup to 1 over `warmup` steps, then falls on a line that would reach `final` one step after the last:
    with `final=0` the last step still moves the weights. The line depends on the phase's full length, so a run that is cut
    short by `train.steps` is a prefix of the full run.
    """
    if index < warmup:
        return (index + 1) / warmup
    left = (steps - index) / max(1, steps - warmup)
    return final + (1.0 - final) * max(0.0, left)
