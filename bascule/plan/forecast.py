"""The forecast of a training step: physics, corrected by the published runs most like it, with an 80 % interval."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from bascule.plan.cost import NAMES, Constants, step_components, step_seconds
from bascule.plan.job import Job
from bascule.plan.regress import OWN, Point, Process
from bascule.plan.run_features import NUMBERS, TERMS, constants_vector, point, prior_vector

OWN_NOISE = 0.3  # of a published run's: what is left in a run that its owner measured


@dataclass(frozen=True)
class Forecast:
    """Seconds of a step with its 80 % interval, its parts (already scaled to the corrected total), and what it rests on."""

    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    correction: float
    basis: str

    def tokens_per_second(self, job: Job) -> float:
        """Tokens a second and chip."""
        return job.tokens_per_step / self.seconds / job.chips


@dataclass(frozen=True)
class Model:
    """Constants and regression as loaded from `data/constants.json`, or as refitted without some rows."""

    constants: Constants
    process: Process
    interval_width: float

    def correction(
        self, jobs: Sequence[Job], without: Container[str] = ()
    ) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of log(actual / physics) for each job, published runs named `without` unlearnt."""
        points = [point(job, self.constants) for job in jobs]
        mean, sd = self.process.predict(points, without)
        back = constants_vector(Constants()) - constants_vector(self.constants)
        shift = np.array([np.array(p.gradient) @ back for p in points])
        return (mean + shift).tolist(), sd.tolist()

    def seconds(self, jobs: Sequence[Job]) -> list[float]:
        """Corrected seconds of a step for several jobs at once, without intervals."""
        return [
            step_seconds(job, self.constants) * math.exp(ratio)
            for job, ratio in zip(jobs, self.correction(jobs)[0], strict=True)
        ]

    def predict(self, job: Job) -> Forecast:
        (log_ratio,), (sd,) = self.correction([job])
        parts = step_components(job, self.constants)
        ratio = math.exp(log_ratio)
        seconds = sum(parts.values()) * ratio
        width = math.exp(self.interval_width * sd)
        return Forecast(
            seconds=seconds,
            low=seconds / width,
            high=seconds * width,
            parts={name: value * ratio for name, value in parts.items()},
            correction=ratio,
            basis=self._basis(job),
        )

    def _basis(self, job: Job) -> str:
        new = point(job, self.constants)
        known = {p.words["chip"] for p in self.process.points if p.family != OWN}
        words = f"physics on {job.chip.figures}, corrected by {self.process.basis(new, 'published runs')}"
        if job.chip.kind not in known:
            words += f"; no published training run on {job.chip.kind}"
        return words

    def trusting(self, names: Container[str]) -> Model:
        """The same with these runs trusted as a user trusts a run of their own, however odd they look beside the others."""
        points = tuple(
            replace(one, noise=OWN_NOISE) if one.name in names else one
            for one in self.process.points
        )
        return replace(self, process=replace(self.process, points=points))

    def with_anchor(
        self, job: Job, measured_s: float, *, name: str = "your run", noise: float = OWN_NOISE
    ) -> Model:
        """Take one measured run of the user's own as a further point; `noise` is that of a published run's."""
        one = replace(point(job, self.constants, family=OWN, name=name), noise=noise)
        back = constants_vector(Constants()) - constants_vector(self.constants)
        target = (
            math.log(measured_s)
            - math.log(step_seconds(job, self.constants))
            - float(np.array(one.gradient) @ back)
        )
        return replace(self, process=self.process.with_point(one, target))


def model_from(raw: dict[str, Any]) -> Model:
    """Rebuild what fit.py wrote."""
    points = tuple(
        Point(
            a["words"],
            tuple(a["numbers"]),
            tuple(a["gradient"]),
            a["family"],
            a["name"],
            a["noise"],
            a["year"],
        )
        for a in raw["anchors"]
    )
    process = Process(
        points=points,
        targets=np.array([a["target"] for a in raw["anchors"]]),
        terms=TERMS,
        sizes=np.array(raw["sizes"]),
        lengths=np.array([raw["lengths"][name] for name in NUMBERS]),
        prior_sd=prior_vector(),
        noise=raw["noise"],
    )
    return Model(
        Constants(*[raw["constants"][name] for name in NAMES]), process, raw["interval_width"]
    )


@functools.cache
def shipped() -> Model:
    with (
        resources.files("bascule.plan")
        .joinpath("data/constants.json")
        .open(encoding="utf-8") as handle
    ):
        return model_from(json.load(handle))
