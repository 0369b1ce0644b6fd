"""Watchers of what goes wrong slowly: no step is an outlier, and yet the run is worse than it was. Warnings, never suspicions.

A phase is cut into windows. A window is worse when its median lies beyond that of the best one so far by `share` of it, by `least`, and by
six standard errors of the two medians; two such windows in a row are told, once until the run is better again. So a hard batch, a noisy
reward and a plateau say nothing, and what a rotten router, a wrong learning rate or rollouts from old weights do to a run is said within
some 100 steps of when it shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bascule.guard.sentinels import Cry, Seen, median

WINDOW = 32
IN_A_ROW = 2
ERRORS = 6.0


@dataclass(frozen=True)
class Level:
    """A window's median, and the standard error of it."""

    middle: float
    error: float
    until: int


@dataclass(frozen=True)
class Course:
    """Of one figure in one phase: the values of the window that is filling, the best window so far, worse ones in a row since."""

    phase: str = ""
    values: tuple[float, ...] = ()
    best: Level | None = None
    worse: int = 0


class Drift:
    """`read`: loss, or the name of a metric. `up`: larger is worse."""

    def __init__(self, name: str, read: str, *, up: bool, share: float, least: float) -> None:
        self.name, self.read, self.up, self.share, self.least = name, read, up, share, least

    def start(self) -> Course:
        return Course()

    def fold(self, state: Course, seen: Seen) -> tuple[Course, Cry | None]:
        value = self._value(seen)
        if value is None or not math.isfinite(value):
            return state, None
        if state.phase != seen.phase:
            state = Course(seen.phase)
        state = replace(state, values=(*state.values, value))
        if len(state.values) < WINDOW:
            return state, None
        return self._close(replace(state, values=()), _level(state.values, seen.step))

    def _close(self, state: Course, now: Level) -> tuple[Course, Cry | None]:
        best = state.best
        if best is None or self._behind(now, best) <= 0:
            return replace(state, best=now, worse=0), None
        behind = self._behind(now, best)
        room = max(self.share * abs(best.middle), self.least, ERRORS * math.hypot(now.error, best.error))  # fmt: skip
        if behind <= room:
            return replace(state, worse=0), None
        state = replace(state, worse=state.worse + 1)
        if state.worse != IN_A_ROW:
            return state, None
        detail = (
            f"the median {self.read} of {WINDOW} steps is {now.middle:.4g}, {IN_A_ROW} windows in a row; "
            f"it was {best.middle:.4g} up to step {best.until}"
        )
        return state, Cry(self.name, behind, room, detail, suspect=False)

    def _behind(self, now: Level, best: Level) -> float:
        return (now.middle - best.middle) * (1.0 if self.up else -1.0)

    def _value(self, seen: Seen) -> float | None:
        if self.read == "loss":
            return None if seen.phase == "grpo" else seen.loss  # centred on 0 there: see Spike
        return seen.metrics.get(self.read)


def _level(values: tuple[float, ...], step: int) -> Level:
    middle = median(values)
    spread = 1.4826 * median([abs(value - middle) for value in values])
    return Level(middle, 1.2533 * spread / math.sqrt(len(values)), step)


def standard() -> tuple[Drift, ...]:
    """Loss; and of reinforcement learning the reward, a policy that turns into noise, and the distance between trainer and rollouts."""
    return (
        Drift("loss drift", "loss", up=True, share=0.25, least=0.05),
        Drift("reward drift", "reward", up=False, share=0.4, least=0.05),
        Drift("entropy drift", "entropy", up=True, share=1.0, least=0.1),
        Drift("mismatch drift", "mismatch_k3_kl", up=True, share=3.0, least=1e-3),
    )
