"""Does a real training, though short, learn on the chip what it learns on the reference?

Paired runs: the same initial weights, the same data in the same order, once here and once on the CPU. What is compared is the mean
log loss of a late window, by two one-sided tests with three answers (equivalence.py). The gradient of the first step is compared
weight by weight beside it, because a loss can agree within a percent while first-layer gradients are off by half (Ascend/pytorch #107).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bascule import numerics
from bascule.accelerators.base import Accelerator, Work
from bascule.qualify import equivalence, pinpoint, workload
from bascule.qualify.checks.layers import nudged
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

QUICK_PAIRS, FULL_PAIRS = 3, 6
QUICK_STEPS, FULL_STEPS = 12, 200
WINDOW = 0.25
MIN_COSINE = (
    0.999  # lower where the reference's own gradient turns further when its weights move by one ulp
)
TURN_MARGIN = 16.0


@dataclass(frozen=True)
class _Turn:
    """How far the chip's first gradient of one weight points from the reference's."""

    cosine: float
    measured: float
    name: str

    @property
    def allowed(self) -> float:
        return min(MIN_COSINE, self.measured)

    @property
    def excess(self) -> float:
        return (1.0 - self.cosine) / (1.0 - self.allowed)


def curve(context: CheckContext) -> list[Evidence]:
    pairs, steps = (QUICK_PAIRS, QUICK_STEPS) if context.quick else (FULL_PAIRS, FULL_STEPS)
    here: list[list[float]] = []
    there: list[list[float]] = []
    worst = _Turn(1.0, MIN_COSINE, "")
    for pair in range(pairs):
        seed = context.seed * 1000 + pair
        reference, reference_grads = _run(context, context.referee, seed, steps)
        if at := _spoilt(reference):
            return [
                context.skipped(f"the reference's own loss is {reference[at - 1]} at step {at}")
            ]
        losses, grads = _run(context, context.accelerator, seed, steps, pair, pairs)
        if at := _spoilt(losses):
            words, script = _carried(context, seed, at)
            return [
                context.failed(
                    f"the loss is {losses[at - 1]} at step {at} of a training that stays finite on the reference{words}",
                    {"step": at},
                    script=script,
                )
            ]
        turned = _turned(context, seed, reference_grads)
        here.append(losses)
        there.append(reference)
        turns = [
            _Turn(
                _cosine(grad, reference_grads[name]), 1.0 - TURN_MARGIN * (1.0 - turned[name]), name
            )
            for name, grad in grads.items()
        ]
        worst = max(worst, *turns, key=lambda turn: turn.excess)
    late_here, late_there = (
        [equivalence.late_mean_log(losses, WINDOW) for losses in runs] for runs in (here, there)
    )
    context.draw({"here": here, "there": there, "window": WINDOW})
    answer = equivalence.compare(late_here, late_there, paired=True)
    return [_evidence(context, answer, worst, steps)]


def _evidence(
    context: CheckContext, answer: equivalence.Equivalence, turn: _Turn, steps: int
) -> Evidence:
    measured: Measured = {
        "answer": answer.answer,
        "difference": answer.difference,
        "ci90_low": answer.ci90[0],
        "ci90_high": answer.ci90[1],
        "margin": answer.margin,
        "power": answer.power,
        "runs_needed": answer.runs_needed,
        "pairs": answer.runs[0],
        "steps": steps,
        "gradient_cosine": turn.cosine,
        "gradient_cosine_allowed": turn.allowed,
        "gradient_tensor": turn.name,
    }
    words = f"{answer.runs[0]} paired trainings of {steps} steps, {answer.sentence()}"
    if turn.excess > 1.0 or answer.answer == "different":
        carried, script = _carried(context, context.seed * 1000, 1)
    if turn.excess > 1.0:
        return context.failed(
            f"the first gradient of {turn.name} points elsewhere (cosine {turn.cosine:.4f}, allowed {turn.allowed:.4f}); {words}{carried}",
            measured,
            script=script,
        )
    if answer.answer == "different":
        return context.failed(words + carried, measured, script=script)
    if answer.answer == "too few runs":
        return context.skipped(words, measured)
    return context.passed(words, measured)


def _carried(context: CheckContext, seed: int, step: int) -> tuple[str, Path | None]:
    """The operator behind it, looked for in one step of fresh weights under the step number at which it showed."""
    work = context.workload
    model = work.model_on(context.accelerator, seed=seed)
    batch = context.accelerator.to_device(work.batch(step, seed=seed))
    run = lambda: workload.forward_backward(model, batch)  # noqa: E731
    return pinpoint.hand_over(context, pinpoint.wrong_call(context, run, step))


def _spoilt(losses: list[float]) -> int:
    """The first step, from 1, whose loss is no positive finite number; 0 when all are."""
    good = (math.isfinite(value) and value > 0 for value in losses)
    return next((step for step, right in enumerate(good, start=1) if not right), 0)


def _run(
    context: CheckContext,
    accelerator: Accelerator,
    seed: int,
    steps: int,
    pair: int = 0,
    pairs: int = 1,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps, and the first step's gradients on the CPU. On the chip: in sessions that report what they raise."""
    guarded = accelerator is context.accelerator
    work = context.workload
    model = work.model_on(accelerator, seed=seed)
    optimizer = work.optimizer(model)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for step in range(1, steps + 1):
        batch = accelerator.to_device(work.batch(step, seed=seed))
        with context.chip(step=step) if guarded else accelerator.session(Work("train", step)):
            result = workload.train_step(model, optimizer, batch)
            losses.append(result.loss)
            if step == 1:
                first = {name: grad.cpu() for name, grad in result.grads.items()}
        if guarded:
            context.progress(pair * steps + step, pairs * steps)
    return losses, first


def _turned(context: CheckContext, seed: int, grads: dict[str, Tensor]) -> dict[str, float]:
    """By name, the cosine between the reference's first gradient and the one it has when all weights move by one ulp."""
    moved = nudged(context.workload.new_model(seed=seed), seed)
    again = workload.forward_backward(moved, context.workload.batch(1, seed=seed)).grads
    return {name: _cosine(grad, again[name]) for name, grad in grads.items()}


def _cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two gradients; 1 when both are zero, 0 when one is, or when the chip's is not finite."""
    left, right = a.double().flatten(), b.double().flatten()
    if numerics.nonfinite_mismatches(left, right):
        return 0.0
    size = float(left.norm() * right.norm())
    if size == 0.0:
        return 1.0 if float(left.norm()) == float(right.norm()) else 0.0
    return float(left @ right) / size
