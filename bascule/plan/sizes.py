"""How much runs miss alike, and over what distance: the regression's sizes, lengths and noise, found by ascent.

What is ascended is how well the process foretells its own points, left out in two ways. The slope is exact: derived backwards
through the closed form of leaving out, one inverse a step, where differences would take one for each size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bascule.plan.regress import Array, Parts, Process

FAMILY_SHARE = 0.6  # of the density: a run unlike any published; the rest: a sister run is known


def fit_sizes(process: Process, *, rounds: int = 15, pull: float = 0.05) -> Process:
    """Ascend the density over sizes, lengths and noise (in logarithms), pulled strongly to where they start. Deterministic.

    Refits without a fifth of the rows showed why: free sizes learn the rows by heart (median error 8.5 % instead of 7.1 %, and
    intervals that hold 62 % instead of 77 %).
    """
    parts, layout = process.parts, _Layout.of(process)
    start = layout.pack(process)
    theta, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    best = (-math.inf, start)
    for step in range(1, rounds + 1):
        here, slope = density(layout.unpack(theta, process), parts)
        here -= pull * float(((theta - start) ** 2).sum())
        slope = slope - 2 * pull * (theta - start)
        best = max(best, (here, theta.copy()), key=lambda pair: pair[0])
        first, second = 0.8 * first + 0.2 * slope, 0.9 * second + 0.1 * slope**2
        rate = 0.12 if step < 40 else 0.05
        theta = theta + rate * first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.9**step)) + 1e-4)
        theta = np.clip(theta, start - 3.5, start + 3.5)
    found = layout.unpack(best[1], process)
    found.__dict__["parts"] = parts  # the pairwise parts do not depend on the sizes
    return found


@dataclass(frozen=True)
class _Layout:
    """Where a process' sizes, lengths and noises stand in one vector of logarithms."""

    sizes: int
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, process: Process) -> _Layout:
        return cls(len(process.sizes), tuple(sorted(process.noise)))

    def pack(self, process: Process) -> Array:
        noise = [process.noise[kind] for kind in self.kinds]
        return np.asarray(np.log(np.concatenate([process.sizes, process.lengths, noise])))

    def unpack(self, theta: Array, process: Process) -> Process:
        raw, tail = np.exp(theta), len(self.kinds)
        return replace(
            process,
            sizes=raw[: self.sizes],
            lengths=raw[self.sizes : -tail],
            noise=dict(zip(self.kinds, raw[-tail:].tolist(), strict=True)),
        )


def density(process: Process, parts: Parts) -> tuple[float, Array]:
    """Log predictive density a point, heavy-tailed so that a few odd rows do not rule it (60 % with the row's whole family left
    out, 40 % with the row alone), and its slope along the logarithms of sizes, lengths and noise."""
    noise = process.noise_variance(process.points)
    covariance = parts.covariance(process.sizes, process.lengths) + np.diag(noise)
    inverse: Array = np.asarray(np.linalg.inv(covariance))
    value, back = 0.0, np.zeros_like(inverse)
    alone = [[i] for i in range(len(process.points))]
    for share, blocks in ((FAMILY_SHARE, _families(process)), (1 - FAMILY_SHARE, alone)):
        part, slope = _left_out(inverse, process.targets, blocks)
        value, back = value + share * part, back + share * slope
    back = -inverse @ back.T @ inverse
    back = (back + back.T) / 2
    slopes = [*parts.slopes(process.sizes, process.lengths, back)]
    kinds = np.array([one.words["kind"] for one in process.points])
    on_noise = 2 * np.diag(back) * noise
    slopes += [float(on_noise[kinds == kind].sum()) for kind in sorted(process.noise)]
    return value, np.array(slopes)


def _families(process: Process) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for index, one in enumerate(process.points):
        found.setdefault(one.family, []).append(index)
    return list(found.values())


def _left_out(inverse: Array, targets: Array, blocks: Sequence[list[int]]) -> tuple[float, Array]:
    """Mean density of the points, each block left out whole, and its slope along the entries of the covariance's inverse."""
    weighted, slope, total = inverse @ targets, np.zeros_like(inverse), 0.0
    for block in blocks:
        inner = np.linalg.inv(inverse[np.ix_(block, block)])
        missed = inner @ weighted[block]
        variance = np.maximum(np.diag(inner), 1e-8)
        odd = missed**2 / variance / 4
        total += float(np.sum(-0.5 * np.log(variance) - 2.5 * np.log1p(odd)))
        by_missed = -1.25 * missed / variance / (1 + odd)
        by_variance = -0.5 / variance + 2.5 * odd / variance / (1 + odd)
        by_weighted = inner @ by_missed
        slope[np.ix_(block, block)] -= np.outer(by_weighted, missed) + inner @ (
            by_variance[:, None] * inner
        )
        slope[block, :] += np.outer(by_weighted, targets)
    return total / len(targets), slope / len(targets)
