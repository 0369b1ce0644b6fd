"""The planner's answers: one training or service on one kind of chip, several side by side, and what a preference costs.

Every figure is an `Estimate`: middle, 80 % interval, unit, and what it rests on. Nothing here prints; `render.py` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bascule.errors import RecipeError
from bascule.plan.anchor import Anchor, Models, from_run, knowing, read_anchor, served, trained
from bascule.plan.architecture import Shape
from bascule.plan.ask import TrainAsk, parse_serve, parse_train, unheard_of
from bascule.plan.catalogue import Chip, chips_from_toml, power_w
from bascule.plan.cost import bubble_share
from bascule.plan.forecast import Forecast, shipped
from bascule.plan.goodput import FailureRate, Goodput, Recovery, goodput, rate_of, save_seconds
from bascule.plan.job import Job
from bascule.plan.layout import Choice, choose, default_batch
from bascule.plan.measured import OWN_STACK, chips_of, read_run, recovery_of
from bascule.plan.memory import Memory
from bascule.plan.models import model_named
from bascule.plan.runs_table import STACKS
from bascule.plan.schedule import Played, Stage, play
from bascule.plan.service_price import Service, price_service

Z80 = 1.2816  # standard normal: half width of an 80 % interval
ASSUMED_PUE = 1.3  # facility power over machine power where the user gives none; assumed


@dataclass(frozen=True)
class Estimate:
    """A figure with its 80 % interval, unit, and what it rests on."""

    value: float
    low: float
    high: float
    unit: str
    basis: str

    def scaled(self, factor: float, unit: str, basis: str = "") -> Estimate:
        return Estimate(
            self.value * factor, self.low * factor, self.high * factor, unit, basis or self.basis
        )


@dataclass(frozen=True)
class TrainingAnswer:
    """All that is said of one training. `money` None when no price is known for the chip; `without_own`: tokens/s per chip by
    published runs alone, where the user's own were taken in."""

    ask: TrainAsk
    job: Job
    layout_basis: str
    memory: Memory
    step: Forecast
    tokens_per_s_chip: Estimate
    useful: Estimate
    failures: Goodput
    days: Estimate
    chip_hours: Estimate
    energy: Estimate
    money: Estimate | None
    played: Played | None
    notes: tuple[str, ...]
    without_own: Estimate | None = None

    @property
    def name(self) -> str:
        return f"{self.ask.chips:,} x {self.ask.chip.name}"


@dataclass(frozen=True)
class Swing:
    """One assumption moved to its ends: the cost of the second option over the first's at the low and the high end."""

    assumption: str
    low: float
    high: float

    @property
    def turns(self) -> bool:
        """Does it change which option is cheaper?"""
        return (self.low - 1) * (self.high - 1) < 0


@dataclass(frozen=True)
class Preference:
    """What preferring `second` over `first` costs. `break_even`: price of the second per price of the first, below which it pays;
    `cost_ratio`: what the swings swing about, equal prices taken where one is unknown."""

    first: str
    second: str
    break_even: Estimate
    break_even_usd_h: Estimate | None
    time_ratio: float
    chip_hours_ratio: float
    energy_ratio: float
    money_ratio: float | None
    cost_ratio: float
    swings: tuple[Swing, ...]


@dataclass(frozen=True)
class Answer:
    """Everything `bascule plan` was asked about one model."""

    model: Shape
    trainings: tuple[TrainingAnswer, ...]
    preferences: tuple[Preference, ...]
    services: tuple[Service, ...]
    anchors: tuple[Anchor, ...] = ()
    notes: tuple[str, ...] = ()


def answer(
    model: str | Shape, *, train: Sequence[str] = (), versus: Sequence[str] = (), serve: Sequence[str] = (),
    chip_file: Path | None = None, anchors: Sequence[str] = (),
) -> Answer:  # fmt: skip
    """Answer for one model: trainings (`train` first, then `versus`, each compared with the first), and services.

    `chip_file`: the user's own chips in TOML, or a run's folder: then its pools are chips, with the figures that qualify
    measured, its fallbacks say how long a recovery takes, and its own pretraining is an anchor. `anchors`: runs that the user
    measured (`anchor.read_anchor`); they correct every answer beside the published ones.
    Raises RecipeError in one sentence for anything that cannot be asked.
    """
    shape = model_named(model) if isinstance(model, str) else model
    records = read_run(chip_file) if chip_file and chip_file.is_dir() else []
    own = chips_of(records) if records else chips_from_toml(chip_file) if chip_file else {}
    recovery = recovery_of(records)
    given, notes = from_run(records, own, shape)
    given += [one for text in anchors for one in read_anchor(text, shape, own)]
    asks: list[TrainAsk] = []
    for text in [*train, *versus]:
        asks.append(parse_train(text, own, tokens=asks[0].tokens if asks else None))
        if len(asks) > 1 and "seq" not in text.lower():
            asks[-1] = replace(asks[-1], sequence=asks[0].sequence)
        if recovery and asks[-1].recovery is None:
            asks[-1] = replace(asks[-1], recovery=recovery)
    asks = [_on_own_stack(ask, given) for ask in asks]
    services = [parse_serve(text, own) for text in serve]
    if not asks and not services:
        raise RecipeError(
            "Nothing was asked: give --train '2048 x H800, 14.8T tokens', --serve 'H20, 4k in, 1k out, 50 ms', or both."
        )
    common = next((ask.batch for ask in asks if ask.batch), None) or max(
        [default_batch(ask) for ask in asks], default=0
    )
    asks = [ask if ask.batch else replace(ask, batch=common) for ask in asks]
    given += [one for ask in services for one in served(shape, ask, "as this service says")]
    trainings, models = _trainings(shape, asks, given)
    return Answer(
        model=shape,
        trainings=trainings,
        preferences=tuple(preference(trainings[0], other) for other in trainings[1:]),
        services=tuple(
            price_service(
                shape,
                ask,
                pue=ask.pue or ASSUMED_PUE,
                model=models.serving if models.taught_serving else None,
            )
            for ask in services
        ),
        anchors=models.anchors,
        notes=(*notes, *(one.warning for one in models.anchors if one.odd)),
    )


def _on_own_stack(ask: TrainAsk, given: Sequence[Anchor]) -> TrainAsk:
    """A pool that the run's folder has an anchor of is planned with the software that trained there, unless another is named."""
    ran = any(
        one.job and one.job.software == OWN_STACK and one.job.chip == ask.chip for one in given
    )
    return replace(ask, software=OWN_STACK) if ran and "software" not in ask.text.lower() else ask


def _trainings(
    shape: Shape, asks: Sequence[TrainAsk], given: Sequence[Anchor]
) -> tuple[tuple[TrainingAnswer, ...], Models]:
    """Each training answered, by published runs and by the user's own: those `given`, and those that an option itself says were
    measured. Such an option keeps the layout that it was measured in."""
    chosen = [choose(shape, ask, shipped()) if ask.measured else None for ask in asks]
    measured = [
        trained(shape, ask, ask.measured, "as this option says", choice.job)
        for ask, choice in zip(asks, chosen, strict=True)
        if ask.measured and choice
    ]
    models = knowing([*given, *measured])
    return tuple(
        train_answer(shape, ask, models, choice) for ask, choice in zip(asks, chosen, strict=True)
    ), models


def train_answer(
    shape: Shape, ask: TrainAsk, models: Models | None = None, choice: Choice | None = None
) -> TrainingAnswer:
    """One training, in the layout chosen for it (None: still to be chosen)."""
    model = models.training if models else shipped()
    if choice is None:
        choice = choose(shape, ask, model)
    elif models and models.anchored:
        choice = replace(choice, forecast=model.predict(choice.job))
    found = _assemble(ask, choice)
    if not models or not models.taught_training:
        return found
    before = _rate(choice.job, shipped().predict(choice.job))
    return replace(found, without_own=before)


def _rate(job: Job, step: Forecast) -> Estimate:
    spread = math.log(step.high / step.low) / 2
    return _around(step.tokens_per_second(job), spread, "tokens/s per chip", step.basis)


def _assemble(ask: TrainAsk, choice: Choice) -> TrainingAnswer:
    job, step = choice.job, choice.forecast
    steps = ask.tokens / job.tokens_per_step
    spread = math.log(step.high / step.low) / 2
    useful = _around(steps * step.seconds, spread, "s", step.basis)
    parts = choice.memory.parts
    recovery = ask.recovery or Recovery(save_s=save_seconds(parts["weights"] + parts["optimizer"]))
    failures = goodput(
        useful.value, ask.chips, ask.chip.vendor, recovery=recovery, rate=_own_rate(ask)
    )
    stretch = math.log(failures.wall_high_s / failures.wall_low_s) / 2
    days = _around(
        failures.wall_s / 86400,
        math.hypot(spread, stretch),
        "days",
        f"{step.basis}; failures: {failures.source}",
    )
    hours = days.scaled(24 * ask.chips, "chip-hours")
    watts, watts_basis = power_w(ask.chip)
    pue = ask.pue or ASSUMED_PUE
    said = f"{watts:,.0f} W a chip all in ({watts_basis}), PUE {pue} ({'given' if ask.pue else 'assumed'})"
    energy = hours.scaled(watts / 1000 * pue / 1000, "MWh", said)
    money = None
    if ask.price_usd_h is not None:
        own = ask.chip.price_note or "the chip file's own"
        note = "given" if ask.price_usd_h != ask.chip.price_usd_h else own
        money = hours.scaled(
            ask.price_usd_h, "USD", f"{ask.price_usd_h:.2f} USD per chip-hour ({note})"
        )
    return TrainingAnswer(
        ask=ask,
        job=job,
        layout_basis=choice.basis,
        memory=choice.memory,
        step=step,
        tokens_per_s_chip=_rate(job, step),
        useful=useful,
        failures=failures,
        days=days,
        chip_hours=hours,
        energy=energy,
        money=money,
        played=_played(job, step),
        notes=choice.notes
        + _chip_notes(ask.chip, ask.precision)
        + tuple(filter(None, [unheard_of(ask.software, STACKS.values())])),
    )


def _own_rate(ask: TrainAsk) -> FailureRate:
    if ask.failures is None:
        return rate_of(ask.chip.vendor)
    return FailureRate(
        ask.failures, ask.failures / 1.5, ask.failures * 1.5, "given, per 1000 node-days"
    )


def _around(value: float, spread: float, unit: str, basis: str) -> Estimate:
    return Estimate(value, value / math.exp(spread), value * math.exp(spread), unit, basis)


def _chip_notes(chip: Chip, precision: str) -> tuple[str, ...]:
    notes = [f"{chip.name}: {chip.note}"] if chip.note else []
    if wider := chip.wider_than(precision):
        notes.append(f"{chip.name} has no {precision} matrix units; its {wider} rate is taken")
    if chip.scaleup_gbs is None:
        notes.append(
            f"{chip.name}: no link bandwidth is published; 150 GB/s inside a node and 200 Gb/s between nodes are assumed"
        )
    return tuple(notes)


def _played(job: Job, step: Forecast) -> Played | None:
    """The chosen pipeline played event by event, the head's extra work on the last stage."""
    lay = job.layout
    if lay.pp == 1:
        return None
    inside = sum(
        value
        for name, value in step.parts.items()
        if name
        not in ("pipeline bubble", "data parallel", "optimizer", "stragglers", "uneven stages")
    )
    one = inside / job.micro_batches / lay.vpp
    head = step.parts.get("uneven stages", 0.0) / job.micro_batches
    stages = [Stage(one / 3, one / 3, one / 3) for _ in range(lay.pp * lay.vpp)]
    last = stages[-1]
    stages[-1] = Stage(last.forward + head / 3, last.backward + head / 3, last.weight + head / 3)
    schedule = lay.schedule if lay.schedule == "interleaved" or lay.vpp == 1 else "interleaved"
    return play(stages, lay.pp, job.micro_batches, schedule)


def expected_bubble(job: Job) -> float:
    return bubble_share(job.layout.pp, job.micro_batches, job.layout.vpp, job.layout.schedule)


def preference(first: TrainingAnswer, second: TrainingAnswer) -> Preference:
    """The price of preferring `second`: break-even first, then what turns the answer."""
    if first.ask.tokens != second.ask.tokens:
        raise RecipeError(
            "The two options train on different numbers of tokens; leave the tokens out of --versus to compare like with like."
        )
    ratio = first.chip_hours.value / second.chip_hours.value
    spread = math.hypot(
        math.log(first.chip_hours.high / first.chip_hours.low) / 2,
        math.log(second.chip_hours.high / second.chip_hours.low) / 2,
    )
    even = _around(
        ratio, spread, "x the price of one chip-hour", "chip-hours of both, failures included"
    )
    price = first.ask.price_usd_h
    priced = first.money is not None and second.money is not None
    return Preference(
        first=first.name,
        second=second.name,
        break_even=even,
        break_even_usd_h=even.scaled(price, "USD per chip-hour") if price is not None else None,
        time_ratio=second.days.value / first.days.value,
        chip_hours_ratio=1 / ratio,
        energy_ratio=second.energy.value / first.energy.value,
        money_ratio=second.money.value / first.money.value
        if priced and first.money and second.money
        else None,
        cost_ratio=cost_ratio(first, second),
        swings=_swings(first, second),
    )


def cost_ratio(first: TrainingAnswer, second: TrainingAnswer) -> float:
    """Cost of the second over the first; equal prices where one is unknown or free."""
    ratio = second.chip_hours.value / first.chip_hours.value
    prices = first.ask.price_usd_h, second.ask.price_usd_h
    return ratio * prices[1] / prices[0] if prices[0] and prices[1] else ratio


def _swings(first: TrainingAnswer, second: TrainingAnswer) -> tuple[Swing, ...]:
    """Cost of the second over the first with one assumption at each end; equal prices where one is unknown."""
    base = cost_ratio(first, second)
    step = {
        one.name: (one.step.low / one.step.seconds, one.step.high / one.step.seconds)
        for one in (first, second)
    }
    fail = {
        one.name: (
            one.failures.wall_low_s / one.failures.wall_s,
            one.failures.wall_high_s / one.failures.wall_s,
        )
        for one in (first, second)
    }
    swings = [
        Swing(f"speed of {second.name}", base * step[second.name][0], base * step[second.name][1]),
        Swing(f"speed of {first.name}", base / step[first.name][1], base / step[first.name][0]),
        Swing(
            f"failures of {second.name}", base * fail[second.name][0], base * fail[second.name][1]
        ),
        Swing(f"failures of {first.name}", base / fail[first.name][1], base / fail[first.name][0]),
        Swing(f"price of {second.ask.chip.name} -30 % to +30 %", base * 0.7, base * 1.3),
        Swing(f"price of {first.ask.chip.name} -30 % to +30 %", base / 1.3, base / 0.7),
    ]
    width: Callable[[Swing], float] = lambda swing: -abs(math.log(swing.high / swing.low))  # noqa: E731
    return tuple(sorted(swings, key=width))
