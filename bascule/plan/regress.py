"""Learning from published runs: a Gaussian process on the logarithm of what the physics missed.

The physics predicts; the runs say by how much it was off. Runs alike (chip, stack, precision, shape, layout) are off alike, so a
new job borrows from the published runs nearest to it, and is given a wide interval where there are none. The physics' own
constants enter as further uncertain directions (their gradients times their priors), so that leaving a family of runs out
also unlearns what that family taught about the constants, exactly to first order and without a refit.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
OWN = "own"  # the family of runs that the user measured


@dataclass(frozen=True)
class Point:
    """One run as the process sees it: words that may agree, numbers that may be near, gradients of the physics' log time.

    `noise` scales the noise of its `kind` word; `year` is the software's date relative to a fixed origin.
    """

    words: Mapping[str, str]
    numbers: tuple[float, ...]
    gradient: tuple[float, ...]
    family: str = ""
    name: str = ""
    noise: float = 1.0
    year: float = 0.0


@dataclass(frozen=True)
class Term:
    """One part of the covariance; points must agree in all `words`. `flat`: they miss by the same; `near`: less so with the
    distance of their numbers; `constants`: they share a deviation of the physics' constants (size in prior widths);
    `drift`: they share a trend over the software's date (`year`, size per year)."""

    words: tuple[str, ...]
    kind: Literal["flat", "near", "constants", "drift"] = "flat"


@dataclass(frozen=True)
class Parts:
    """What the covariance of two lists of points is made of before its sizes are known."""

    shared: Array
    squares: Array
    masks: tuple[Array, ...]
    drift: Array
    terms: tuple[Term, ...]

    @classmethod
    def between(
        cls, a: Sequence[Point], b: Sequence[Point], terms: tuple[Term, ...], prior_sd: Array
    ) -> Parts:
        ga, gb = (
            np.array([p.gradient for p in side]).reshape(len(side), -1) * prior_sd
            for side in (a, b)
        )
        na, nb = (np.array([p.numbers for p in side]).reshape(len(side), -1) for side in (a, b))
        masks = []
        for term in terms:
            mask = np.ones((len(a), len(b)))
            for word in term.words:
                wa, wb = np.array([p.words[word] for p in a]), np.array([p.words[word] for p in b])
                mask *= wa[:, None] == wb[None, :]
            masks.append(mask)
        drift = np.outer([p.year for p in a], [p.year for p in b])
        return cls(ga @ gb.T, (na[:, None, :] - nb[None, :, :]) ** 2, tuple(masks), drift, terms)

    def covariance(self, sizes: Array, lengths: Array) -> Array:
        kinds = self._kinds(self.squares @ (1 / lengths**2))
        total: Array = self.shared.copy()
        for term, mask, size in zip(self.terms, self.masks, sizes, strict=True):
            total += float(size) ** 2 * mask * kinds[term.kind]
        return total

    def _kinds(self, distance: Array) -> dict[str, Array]:
        return {
            "flat": np.ones_like(distance),
            "near": 0.5 * np.exp(-0.5 * distance) + 0.5 / (1 + distance),
            "constants": self.shared,
            "drift": self.drift,
        }

    def slopes(self, sizes: Array, lengths: Array, along: Array) -> list[float]:
        """How much `along` (a slope along each entry of the covariance) moves with the logarithm of each size, then length."""
        distance = self.squares @ (1 / lengths**2)
        kinds, nearness, found = self._kinds(distance), np.zeros_like(distance), []
        for term, mask, size in zip(self.terms, self.masks, sizes, strict=True):
            part = float(size) ** 2 * mask
            found.append(2 * float(np.sum(along * part * kinds[term.kind])))
            nearness += part if term.kind == "near" else 0.0
        falls = along * nearness * (-0.25 * np.exp(-0.5 * distance) - 0.5 / (1 + distance) ** 2)
        by_length = np.einsum("ij,ijk->k", falls, self.squares) * (-2 / lengths**2)
        return [*found, *(float(one) for one in by_length)]


@dataclass(frozen=True)
class Process:
    """A fitted process: its points, their targets (log measured minus log predicted), the terms' sizes, the numbers' lengths,
    and the noise of each kind of point."""

    points: tuple[Point, ...]
    targets: Array
    terms: tuple[Term, ...]
    sizes: Array
    lengths: Array
    prior_sd: Array
    noise: Mapping[str, float] = field(default_factory=dict)

    def noise_variance(self, points: Sequence[Point]) -> Array:
        return np.array([(self.noise[p.words["kind"]] * p.noise) ** 2 for p in points])

    @cached_property
    def parts(self) -> Parts:
        return Parts.between(self.points, self.points, self.terms, self.prior_sd)

    @cached_property
    def system(self) -> Array:
        """The points' covariance with noise."""
        shared = self.parts.covariance(self.sizes, self.lengths)
        return np.asarray(shared + np.diag(self.noise_variance(self.points)))

    @cached_property
    def inverse(self) -> Array:
        return np.asarray(np.linalg.inv(self.system))

    def cross(self, new: Sequence[Point]) -> Array:
        return Parts.between(new, self.points, self.terms, self.prior_sd).covariance(
            self.sizes, self.lengths
        )

    def predict(self, new: Sequence[Point], without: Container[str] = ()) -> tuple[Array, Array]:
        """Mean and standard deviation (noise included) of the log error at new points, those named `without` unlearnt."""
        keep = [i for i, p in enumerate(self.points) if p.name not in without]
        whole = len(keep) == len(self.points)
        inverse = self.inverse if whole else np.linalg.inv(self.system[np.ix_(keep, keep)])
        cross = self.cross(new)[:, keep]
        own = np.diag(
            Parts.between(new, new, self.terms, self.prior_sd).covariance(self.sizes, self.lengths)
        )
        spread = own - np.einsum("ij,jk,ik->i", cross, inverse, cross) + self.noise_variance(new)
        return cross @ inverse @ self.targets[keep], np.sqrt(np.maximum(spread, 1e-8))

    def left_out(self, groups: Sequence[str] | None = None) -> tuple[Array, Array]:
        """Predictions at each point when its whole group (default: family) is left out; closed form from one inverse."""
        names = list(groups) if groups is not None else [p.family for p in self.points]
        blocks: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            blocks.setdefault(name, []).append(index)
        weighted = self.inverse @ self.targets
        alone = np.diag(self.inverse)
        mean, sd = self.targets - weighted / alone, 1 / np.sqrt(alone)
        for block in (block for block in blocks.values() if len(block) > 1):
            inner = np.linalg.inv(self.inverse[np.ix_(block, block)])
            mean[block] = self.targets[block] - inner @ weighted[block]
            sd[block] = np.sqrt(np.maximum(np.diag(inner), 1e-8))
        return mean, sd

    def same(self, new: Point) -> Point | None:
        """The point that is this very run: told by its inputs, whatever it is called, or by its name, chip and model."""
        for one in self.points:
            named = one.name == new.name and all(
                one.words[word] == new.words[word] for word in ("chip", "model")
            )
            if named or (
                one.words == new.words and np.allclose(one.numbers, new.numbers, atol=1e-3)
            ):
                return one
        return None

    def with_point(self, one: Point, target: float) -> Process:
        """The process that also knows this point."""
        return replace(
            self, points=(*self.points, one), targets=np.append(self.targets, float(target))
        )

    def nearest(self, new: Point, count: int = 3) -> list[Point]:
        """The published runs that are most alike in what makes a run miss the physics."""
        own = self.parts.covariance(self.sizes, self.lengths).diagonal()
        cross = self.cross([new])[0] / np.sqrt(own)
        published = [i for i in np.argsort(-cross) if self.points[int(i)].family != OWN]
        return [self.points[int(i)] for i in published[:count]]

    def basis(self, new: Point, what: str) -> str:
        """What a forecast at this point was corrected by, in words: the published runs, and the user's own."""
        own = [one.name for one in self.points if one.family == OWN]
        near = ", ".join(
            f"{one.words['model']} on {one.words['chip']} ({one.name})" for one in self.nearest(new)
        )
        words = f"{len(self.points) - len(own)} {what} (nearest: {near})"
        return words + (f" and by your own: {'; '.join(own)}" if own else "")


TAIL = 4.0  # degrees of freedom of the Student distribution that runs are taken to miss by


def distrusting(process: Process) -> Process:
    """The process with more noise on runs that miss what all others say of them: one step towards a heavy-tailed likelihood. A
    broken kernel or a mistyped cell then teaches its neighbours less."""
    mean, sd = process.left_out([one.name for one in process.points])
    surprise = ((process.targets - mean) / sd) ** 2
    inflated = np.maximum(1.0, (TAIL + surprise) / (TAIL + 1))
    noise = process.noise_variance(process.points)
    scale = np.sqrt(1 + sd**2 * (inflated - 1) / noise)
    points = tuple(
        replace(one, noise=round(one.noise * float(more), 5))
        for one, more in zip(process.points, scale, strict=True)
    )
    return replace(process, points=points)
