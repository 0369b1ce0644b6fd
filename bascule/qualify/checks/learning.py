"""Does a real training, though short, learn on the chip what it learns on the reference?

Paired runs: the same initial weights, the same data in the same order, once here and once on the CPU. What is compared is the mean
log loss of a late window, by two one-sided tests with three answers (equivalence.py). The gradient of the first step is compared
weight by weight beside it, because a loss can agree within a percent while first-layer gradients are off by half (Ascend/pytorch #107).
"""

from __future__ import annotations

import math

from torch import Tensor

from bascule import numerics
from bascule.accelerators.base import Accelerator, Work
from bascule.qualify import equivalence, workload
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

QUICK_PAIRS, FULL_PAIRS = 3, 6
QUICK_STEPS, FULL_STEPS = 12, 200
WINDOW = 0.25
MIN_COSINE = 0.999


def curve(context: CheckContext) -> list[Evidence]:
    pairs, steps = (QUICK_PAIRS, QUICK_STEPS) if context.quick else (FULL_PAIRS, FULL_STEPS)
    here: list[float] = []
    there: list[float] = []
    worst_cosine, worst_name = 1.0, ""
    for pair in range(pairs):
        seed = context.seed * 1000 + pair
        losses, grads = _run(context, context.accelerator, seed, steps, guarded=True)
        reference, reference_grads = _run(context, context.referee, seed, steps, guarded=False)
        if not all(math.isfinite(value) and value > 0 for value in losses):
            at = next(
                step
                for step, value in enumerate(losses, start=1)
                if not (math.isfinite(value) and value > 0)
            )
            return [
                context.failed(
                    f"the loss is {losses[at - 1]} at step {at} of a training that stays finite on the reference",
                    {"step": at},
                )
            ]
        here.append(equivalence.late_mean_log(losses, WINDOW))
        there.append(equivalence.late_mean_log(reference, WINDOW))
        for name, grad in grads.items():
            cosine = _cosine(grad, reference_grads[name])
            if cosine < worst_cosine:
                worst_cosine, worst_name = cosine, name
    answer = equivalence.compare(here, there, paired=True)
    return [_evidence(context, answer, worst_cosine, worst_name, steps)]


def _evidence(
    context: CheckContext, answer: equivalence.Equivalence, cosine: float, name: str, steps: int
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
        "lowest_gradient_cosine": cosine,
        "lowest_gradient_tensor": name,
    }
    words = f"{answer.runs[0]} paired trainings of {steps} steps, {answer.sentence()}"
    if cosine < MIN_COSINE:
        return context.failed(
            f"the first gradient of {name} points elsewhere (cosine {cosine:.4f}, allowed {MIN_COSINE}); {words}",
            measured,
        )
    if answer.answer == "different":
        return context.failed(words, measured)
    if answer.answer == "too few runs":
        return context.skipped(words, measured)
    return context.passed(words, measured)


def _run(
    context: CheckContext, accelerator: Accelerator, seed: int, steps: int, *, guarded: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps, and the first step's gradients on the CPU. `guarded`: in a chip session that reports what it raises."""
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
    return losses, first


def _cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two gradients; 1 when both are zero, 0 when one is, or when the chip's is not finite."""
    left, right = a.double().flatten(), b.double().flatten()
    if numerics.nonfinite_mismatches(left, right):
        return 0.0
    size = float(left.norm() * right.norm())
    if size == 0.0:
        return 1.0 if float(left.norm()) == float(right.norm()) else 0.0
    return float(left @ right) / size
