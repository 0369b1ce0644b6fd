"""Learning-rate factors: linear warm-up, then linear decay or a plateau that ends in one. A factor multiplies every group's peak rate."""

from __future__ import annotations


def wsd(index: int, steps: int, *, warmup: int, decay: float, final: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): full rate until the last `decay` share of the steps, then a
    line down to `final`. A run can be prolonged from any point of the plateau without having planned its length."""
    falling = max(1, round(steps * decay))
    if index < steps - falling:
        return min(1.0, (index + 1) / warmup) if warmup else 1.0
    left = (steps - index) / falling
    return final + (1.0 - final) * max(0.0, min(1.0, left))


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
