"""Anchors: runs that the user measured, taken beside the published ones and trusted more. Each says what it changed.

One measured run of the same chip and software tells what no datasheet does (one-anchor errors are half of those without;
docs/plan.md). It may come from `--anchor`, from a part `measured ...` of a question, or from the pretraining of a run's folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bascule.errors import RecipeError, nearest
from bascule.plan.architecture import Shape
from bascule.plan.ask import (
    TRAIN_UNSAID,
    ServeAsk,
    TrainAsk,
    in_one,
    parse_serve,
    settled,
    started,
    train_part,
)
from bascule.plan.ask_parts import parts_of, taken
from bascule.plan.catalogue import Chip
from bascule.plan.cost import gemm_peak
from bascule.plan.figures import Triple, number
from bascule.plan.forecast import OWN_NOISE, Model, shipped
from bascule.plan.job import Job
from bascule.plan.layout import choose
from bascule.plan.measured import pretrained
from bascule.plan.models import ALIASES, model_named, named
from bascule.plan.service_price import operating_point
from bascule.plan.serving import Serving
from bascule.plan.serving_forecast import ServeModel, shipped_serving
from bascule.plan.speed import Of, Speed, speed_of
from bascule.records import AnyRecord

GUESSED_NOISE = 1.0  # of a published run's, where the layout of an own run had to be guessed
ODD = (
    2.0  # half widths of the 80 % interval from which a run is said to be odd: one in a hundred is
)
SERVED = re.compile(
    r"\b(decode|decoding|prefill|mixed)\b|\d\s*k?\s*(in|out|prompt|completion)$|^(ttft|tpot)\b|\d\s*ms$"
)


@dataclass(frozen=True)
class Anchor:
    """One measured run: `value` tokens a second and chip, and what was forecast of it before (middle, low, high). `job` of a
    training, `point` of a service; `guessed`: its layout was not given."""

    words: str
    source: str
    of: Of
    value: float
    forecast: Triple
    job: Job | None = None
    point: Serving | None = None
    guessed: bool = False

    @property
    def ratio(self) -> float:
        """Measured over forecast."""
        return self.value / self.forecast[0]

    @property
    def odd(self) -> bool:
        """Does it lie where one run in a hundred does?"""
        middle, low, high = self.forecast
        return (
            not low * (low / middle) ** (ODD - 1)
            <= self.value
            <= high * (high / middle) ** (ODD - 1)
        )

    @property
    def warning(self) -> str:
        low, high = self.forecast[1:]
        return f"your own run ({self.words}) lies far outside its forecast of {number(low)} to {number(high)} tokens/s per chip: check its unit, layout, precision and software"


@dataclass(frozen=True)
class Models:
    """What answers: published runs alone where there is no anchor, else these and the user's own."""

    training: Model
    serving: ServeModel
    anchors: tuple[Anchor, ...] = ()

    @property
    def anchored(self) -> bool:
        return bool(self.anchors)

    @property
    def taught_training(self) -> bool:
        return any(one.job for one in self.anchors)

    @property
    def taught_serving(self) -> bool:
        return any(one.point for one in self.anchors)


def knowing(anchors: Iterable[Anchor]) -> Models:
    """The shipped models with these runs taken in."""
    found = tuple(anchors)
    training, serving = shipped(), shipped_serving()
    for one in found:
        if one.job is not None:
            seconds = one.job.tokens_per_step / one.job.chips / one.value
            noise = GUESSED_NOISE if one.guessed else OWN_NOISE
            training = training.with_anchor(one.job, seconds, name=one.words, noise=noise)
        if one.point is not None:
            serving = serving.with_anchor(one.point, one.value, name=one.words)
    return Models(training, serving, found)


def read_anchor(text: str, shape: Shape, own: Mapping[str, Chip] | None = None) -> list[Anchor]:
    """`--anchor "512 x H800, llama-3-70b, seq 8k, batch 1024, TP4 PP8, 410 tokens/s/chip"`, or a service: `"32 x H800, 4k in, 1k
    out, 50 ms, decode 1850 tokens/s/chip"`. The model is the plan's own unless one is named. Raises RecipeError in one sentence."""
    head, *rest = parts_of(text)
    models = [part for part in rest if _model(part) is not None]
    if len(models) > 1:
        raise RecipeError(f"--anchor '{text}' names {len(models)} models; a run has one.")
    if models:
        shape = _model(models[0]) or shape
    rest = [part for part in rest if part not in models]
    try:
        if any(SERVED.search(part.lower()) for part in rest):
            return _service(text, ", ".join([head, *rest]), shape, own)
        return [_training(text, head, rest, shape, own)]
    except RecipeError as error:
        word = re.match(r"'([^']*)' is not understood", str(error))
        if word and (hint := nearest(word[1].lower(), _models())):
            raise RecipeError(
                f"'{word[1]}' is neither a model the planner knows nor a part of --anchor.{hint}"
            ) from None
        raise


def _models() -> list[str]:
    return [*named(), *ALIASES]


def _model(part: str) -> Shape | None:
    try:
        return model_named(part)
    except RecipeError:
        if part.endswith(".json"):
            raise
        return None


def _training(
    text: str, head: str, rest: Sequence[str], shape: Shape, own: Mapping[str, Chip] | None
) -> Anchor:
    ask = settled(taken(started(text, head, own), in_one(rest), train_part, TRAIN_UNSAID))
    if ask.measured is None:
        raise RecipeError(
            f"--anchor '{text}' does not say how fast it ran; add '410 tokens/s/chip', '840k tokens/s in all' or '12.5 s a step'."
        )
    return trained(shape, ask, ask.measured, "--anchor")


def trained(
    shape: Shape, ask: TrainAsk, speed: Speed, source: str, job: Job | None = None
) -> Anchor:
    """A measured training as an anchor. `job`: the one whose forecast is asked, whatever its layout; else a layout that was not
    given is the one that the planner would choose, and the anchor is trusted less."""
    if speed.unit == "s a step" and ask.batch is None:
        speed.per_chip(ask.chips)  # refuses
    guessed = job is None and ask.layout is None
    job = job or choose(shape, ask, shipped()).job
    value = speed.per_chip(ask.chips, job.tokens_per_step)
    limit = gemm_peak(job.chip, job.precision) / shape.train_flops(job.sequence)
    _possible(speed, value, limit, f"{job.chip.name} at {job.precision} training {shape.name}")
    return training_anchor(job, value, source, guessed=guessed)


def training_anchor(job: Job, value: float, source: str, *, guessed: bool = False) -> Anchor:
    said = shipped().predict(job)
    rates = [job.tokens_per_step / job.chips / s for s in (said.seconds, said.high, said.low)]
    words = f"{job.chips:,} x {job.chip.name} trained {job.shape.name} at {value:,.4g} tokens/s per chip ({source})"
    return Anchor(
        words, source, "train", value, (rates[0], rates[1], rates[2]), job=job, guessed=guessed
    )


LEAST_SHARE = 0.01  # of the asked model's parameters that a run must have trained to speak for it


def from_run(
    records: Sequence[AnyRecord], own: Mapping[str, Chip], shape: Shape
) -> tuple[list[Anchor], list[str]]:
    """The pretraining of a run's folder as anchors, and why a run that trained something much smaller is none."""
    found, notes = [], []
    for job, value in pretrained(records, own):
        if job.shape.parameters < LEAST_SHARE * shape.parameters:
            notes.append(
                f"the run's own pretraining on '{job.chip.name}' ({value:,.4g} tokens/s per chip) is of {number(job.shape.parameters / 1e6)} M parameters, too few to speak for {number(shape.parameters / 1e6)} M: it is no anchor"
            )
        else:
            found.append(training_anchor(job, value, "the run's own pretraining"))
    return found, notes


def _service(
    text: str, question: str, shape: Shape, own: Mapping[str, Chip] | None
) -> list[Anchor]:
    ask = parse_serve(question, own)
    if not ask.measured:
        raise RecipeError(
            f"--anchor '{text}' does not say how fast it served; add 'decode 1850 tokens/s/chip', 'prefill 9k tokens/s/chip' or 'mixed 900 tokens/s/chip'."
        )
    timed = any(re.search(r"\d\s*m?s\b(?! a step)", part.lower()) for part in parts_of(question) if speed_of(part, serving=True) is None and "ttft" not in part.lower())  # fmt: skip
    if not timed and any(speed.of != "prefill" for speed in ask.measured):
        raise RecipeError(
            f"--anchor '{text}': a decoding rate says nothing without the time a token took; add for instance '50 ms'."
        )
    return served(shape, ask, "--anchor")


def served(shape: Shape, ask: ServeAsk, source: str) -> list[Anchor]:
    """What a service did, as anchors: the batch is what its rate and its time a token come to."""
    point = operating_point(shape, ask)
    found = []
    for speed in ask.measured:
        limit = gemm_peak(ask.chip, ask.precision) / (2 * shape.active_weights)
        _possible(
            speed, speed.value, limit, f"{ask.chip.name} at {ask.precision} serving {shape.name}"
        )
        batch = speed.value * ask.tpot_s if speed.of != "prefill" else None
        one = replace(point, phase=speed.of, batch=batch)
        said = shipped_serving().predict(one)
        words = f"{one.chips:,} x {one.chip.name} served {shape.name}: {LABELS[speed.of]} {speed.value:,.4g} tokens/s per chip ({source})"
        found.append(Anchor(words, source, speed.of, speed.value, said, point=one))
    return found


LABELS: Mapping[Literal["train", "decode", "prefill", "both"], str] = {
    "train": "training",
    "decode": "decode",
    "prefill": "prefill",
    "both": "mixed",
}


def _possible(speed: Speed, value: float, limit: float, what: str) -> None:
    if value > limit:
        raise RecipeError(
            f"'{speed.text}' is {value / limit:.3g} times what {what} can do at its peak; above 0 and up to {limit:,.4g} tokens/s/chip is allowed."
        )
