"""Is each operator of this model as precise as its type allows? On the model's own inputs, forward and backward judged apart.

Forward: every traced call is played on the chip and held against fp64. Backward: each differentiable call of the forward trace
is differentiated on the chip by itself, with an incoming gradient as small as a real one (1e-5), and each input's gradient is
held against fp64 by itself: a wrong gradient cannot hide behind a right forward value, nor a small one behind an absolute bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from bascule.errors import DeviceFault
from bascule.qualify import reproduce
from bascule.qualify.context import CheckContext, describe
from bascule.qualify.hold import CPU, Held, Miss, hold_call, nudge
from bascule.qualify.trace import Call, Moved
from bascule.records import Evidence

GRADIENT_SIZE = 1e-5  # a typical gradient late in training; msprobe's 0.001 short cut passes anything of this size
HALF_TYPES = (torch.bfloat16, torch.float16)
Runner = Callable[[Call, torch.device, Moved], list[Tensor]]


def forward(context: CheckContext) -> list[Evidence]:
    phase = "inference" if context.role == "infer" else "forward"
    return examine(context, [(call, _play) for call in context.workload.trace.of(phase)])


def optimizer(context: CheckContext) -> list[Evidence]:
    return examine(context, [(call, _play) for call in context.workload.trace.of("optimizer")])


def backward(context: CheckContext) -> list[Evidence]:
    trace = context.workload.trace
    differentiated = [
        (call, _differentiate) for call in trace.of("forward") if _differentiable(call)
    ]
    return examine(context, differentiated + [(call, _play) for call in trace.of("backward")])


def half(context: CheckContext) -> list[Evidence]:
    """The forward calls, and for training their gradients, as a chip runs them under autocast."""
    phase = "inference" if context.role == "infer" else "forward"
    calls = [call.cast(dtype) for dtype in HALF_TYPES for call in context.workload.trace.of(phase)]
    questions = [(call, _play) for call in calls]
    if context.role == "train":
        questions += [(call, _differentiate) for call in calls if _differentiable(call)]
    return examine(context, questions)


def examine(context: CheckContext, questions: Iterable[tuple[Call, Runner]]) -> list[Evidence]:
    """Run every call on the chip and hold it; one finding per operator (its smallest case), or one pass with the figures."""
    asked = [
        _Question(call, runner, truth)
        for call, runner in questions
        if _askable(call) and (truth := _truth(context.seed, call, runner))
    ]
    device = context.accelerator.device
    placed = [one.call.place(device) for one in asked]
    # One session for all calls, and nothing but the chip's own work in it: on a simulated chip over the CPU whatever runs
    # inside a session is computed by the chip.
    with context.chip():
        answers = [_answer(one, device, inputs) for one, inputs in zip(asked, placed, strict=True)]
    held = [_hold(one, answer) for one, answer in zip(asked, answers, strict=True)]
    misses = [miss for one in held for miss in one.misses]
    if misses:
        return [
            _finding(context, operator, of_it) for operator, of_it in _by_operator(misses).items()
        ]
    worst = max(held, key=lambda one: one.worst_ratio, default=Held(0, 0.0, "", ()))
    detail = f"{len(held)} calls right; largest RMS error {worst.worst_ratio:.2f} times the noise floor ({worst.worst})"
    return [context.passed(detail, {"calls": len(held), "worst_ratio": worst.worst_ratio})]


@dataclass(frozen=True)
class _Truth:
    """What the CPU says: in fp64, at the call's own type, and with inputs moved by one ulp."""

    exact: list[Tensor]
    plain: list[Tensor]
    nudged: list[Tensor]


def _askable(call: Call) -> bool:
    return not call.is_view and call.has_defined_value and bool(call.tensors())


def _truth(seed: int, call: Call, runner: Runner) -> _Truth | None:
    """None when the reference itself cannot run the call: then it is no question to put to the chip."""
    try:
        return _Truth(
            exact=runner(call, CPU, call.place(CPU, torch.float64)),
            plain=runner(call, CPU, call.place(CPU)),
            nudged=runner(call, CPU, nudge(seed, call)),
        )
    except (RuntimeError, TypeError):
        return None


@dataclass(frozen=True)
class _Question:
    call: Call
    runner: Runner
    truth: _Truth


def _answer(one: _Question, device: torch.device, inputs: Moved) -> list[Tensor] | str:
    """The chip's outputs, or what it raised."""
    try:
        return one.runner(one.call, device, inputs)
    except (RuntimeError, DeviceFault) as error:
        return describe(error)


def _hold(one: _Question, answer: list[Tensor] | str) -> Held:
    if isinstance(answer, str):
        return Held(
            0, 0.0, one.call.name, (Miss(one.call, 0, f"the chip raised {answer}", None, None),)
        )
    return hold_call(one.call, answer, one.truth.exact, one.truth.plain, one.truth.nudged)


def _play(call: Call, device: torch.device, placed: Moved) -> list[Tensor]:
    with torch.no_grad():
        return call.run(device, moved=placed)


def _differentiate(call: Call, device: torch.device, placed: Moved) -> list[Tensor]:
    """Gradients of every float input for a small, fixed incoming gradient."""
    args, kwargs = placed
    inputs = [leaf for leaf in _leaves(args, kwargs) if leaf.is_floating_point()]
    for leaf in inputs:
        leaf.requires_grad_(True)
    outputs = [out for out in call.run(device, moved=placed) if out.requires_grad]
    incoming = [_incoming(out) for out in outputs]
    grads = torch.autograd.grad(outputs, inputs, incoming, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(inputs, grads, strict=True)
    ]


def _incoming(out: Tensor) -> Tensor:
    """A fixed pattern without random numbers, so that the stand-alone script can make the same."""
    pattern = GRADIENT_SIZE * torch.cos(torch.arange(out.numel(), dtype=torch.float64))
    return pattern.reshape(out.shape).to(out.device, out.dtype)


def _differentiable(call: Call) -> bool:
    inputs = [tensor for tensor in call.tensors() if tensor.is_floating_point()]
    return bool(inputs) and not call.mutates and not call.is_view and call.has_defined_value


def _leaves(args: object, kwargs: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]


def _by_operator(misses: Sequence[Miss]) -> dict[str, list[Miss]]:
    grouped: dict[str, list[Miss]] = {}
    for miss in misses:
        grouped.setdefault(miss.call.name, []).append(miss)
    return grouped


def _finding(context: CheckContext, operator: str, misses: list[Miss]) -> Evidence:
    """The smallest failing call stands for its operator; the count of the others is given."""
    smallest = min(misses, key=lambda miss: sum(tensor.numel() for tensor in miss.call.tensors()))
    what = "gradient of " if context.ask and context.ask.check.name == "numerics.backward" else ""
    detail = f"{what}{operator}: {smallest.why} ({len(misses)} outputs of this operator are wrong)"
    script = reproduce.operator_script(context, smallest)
    return context.failed(detail, smallest.measured(), script=script)
