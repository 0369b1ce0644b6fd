"""Is each operator of this model as precise as its type allows? On the model's own inputs, forward and backward judged apart.

Forward: every traced call is played on the chip and held against fp64. Backward: each differentiable call of the forward trace
is differentiated on the chip by itself, with an incoming gradient as small as a real one (1e-5), and each input's gradient is
held against fp64 by itself: a wrong gradient cannot hide behind a right forward value, nor a small one behind an absolute bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from bascule.qualify import reproduce
from bascule.qualify.context import CheckContext
from bascule.qualify.hold import Held, Miss
from bascule.qualify.question import (
    Runner,
    differentiable,
    differentiate,
    play,
    put,
    question,
    shrunk,
)
from bascule.qualify.trace import Call
from bascule.records import Evidence

HALF_TYPES = (torch.bfloat16, torch.float16)


def forward(context: CheckContext) -> list[Evidence]:
    phase = "inference" if context.role == "infer" else "forward"
    return examine(context, [(call, play) for call in context.workload.trace.of(phase)])


def optimizer(context: CheckContext) -> list[Evidence]:
    return examine(context, [(call, play) for call in context.workload.trace.of("optimizer")])


def backward(context: CheckContext) -> list[Evidence]:
    trace = context.workload.trace
    differentiated = [(call, differentiate) for call in trace.of("forward") if differentiable(call)]
    return examine(context, differentiated + [(call, play) for call in trace.of("backward")])


def half(context: CheckContext) -> list[Evidence]:
    """The forward calls, and for training their gradients, as a chip runs them under autocast."""
    phase = "inference" if context.role == "infer" else "forward"
    calls = [call.cast(dtype) for dtype in HALF_TYPES for call in context.workload.trace.of(phase)]
    questions = [(call, play) for call in calls]
    if context.role == "train":
        questions += [(call, differentiate) for call in calls if differentiable(call)]
    return examine(context, questions)


def examine(context: CheckContext, questions: Iterable[tuple[Call, Runner]]) -> list[Evidence]:
    """Run every call on the chip and hold it; one finding per operator (its smallest case), or one pass with the figures."""
    wanted, asked = list(questions), []
    for place, (call, runner) in enumerate(wanted):
        context.progress(place, 2 * len(wanted))
        if one := question(context.seed, call, runner):
            asked.append(one)
    held = put(context, asked)
    context.draw({"operators": _by_error(held)})
    misses = [miss for one in held for miss in one.misses]
    if misses:
        return [_finding(context, of_it) for of_it in _by_operator(misses).values()]
    worst = max(held, key=lambda one: one.worst_ratio, default=Held(0, 0.0, "", ()))
    detail = f"{len(held)} calls right; largest RMS error {worst.worst_ratio:.2f} times the noise floor ({worst.worst})"
    return [context.passed(detail, {"calls": len(held), "worst_ratio": worst.worst_ratio})]


def _by_error(held: Sequence[Held]) -> list[dict[str, float | str | int]]:
    """By operator: calls, wrong outputs, and the largest RMS error in noise floors."""
    rows: dict[str, dict[str, float | str | int]] = {}
    for one in held:
        name = one.worst or (one.misses[0].call.name if one.misses else "")
        if not name:
            continue  # whole numbers only, all equal
        row = rows.setdefault(name, {"operator": name, "calls": 0, "wrong": 0, "ratio": 0.0})
        row["calls"] = int(row["calls"]) + 1
        row["wrong"] = int(row["wrong"]) + len(one.misses)
        if math.isfinite(one.worst_ratio):
            row["ratio"] = max(float(row["ratio"]), one.worst_ratio)
    return list(rows.values())


def _by_operator(misses: Sequence[Miss]) -> dict[str, list[Miss]]:
    grouped: dict[str, list[Miss]] = {}
    for miss in misses:
        grouped.setdefault(miss.call.name, []).append(miss)
    return grouped


def _finding(context: CheckContext, misses: list[Miss]) -> Evidence:
    """The smallest failing call, shrunk, stands for its operator; the count of the others is given."""
    smallest = min(misses, key=lambda miss: sum(tensor.numel() for tensor in miss.call.tensors()))
    least = shrunk(context, smallest)
    what = "gradient of " if least.differentiated else ""
    detail = f"{what}{least.call.name}: {least.why} ({len(misses)} outputs of this operator are wrong; smallest case {least.call.signature})"
    script = reproduce.operator_script(context, least)
    return context.failed(detail, least.measured(), script=script)
