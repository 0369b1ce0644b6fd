"""One operator call as a question to a chip: how it is run, what the truth is, and whether the chip's answer holds.

Also how a finding is made smaller before it is reported, as Hypothesis shrinks: sizes are cut as long as the answer stays wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from bascule.errors import DeviceFault
from bascule.qualify.context import CheckContext, ChipFailed, describe
from bascule.qualify.hold import CPU, Held, Miss, hold_call, nudge
from bascule.qualify.trace import Call, Moved, signature_of

GRADIENT_SIZE = 1e-5  # a typical gradient late in training; msprobe's 0.001 short cut passes anything of this size
SHRINK_TRIES = 40
SHRINK_S = 3.0
Runner = Callable[[Call, torch.device, Moved], list[Tensor]]


@dataclass(frozen=True)
class Question:
    """`runner` is `play` or `differentiate`. `exact`, `plain`, `nudged`: what the CPU says in fp64, at the call's own type, and
    with inputs moved by one ulp."""

    call: Call
    runner: Runner
    exact: list[Tensor]
    plain: list[Tensor]
    nudged: list[Tensor]


def question(seed: int, call: Call, runner: Runner) -> Question | None:
    """None when the reference itself cannot run the call: then it is no question to put to a chip."""
    if call.is_view or not call.has_defined_value or not call.tensors():
        return None
    try:
        return Question(
            call,
            runner,
            exact=runner(call, CPU, call.place(CPU, torch.float64)),
            plain=runner(call, CPU, call.place(CPU)),
            nudged=runner(call, CPU, nudge(seed, call)),
        )
    except (RuntimeError, TypeError, IndexError):
        return None


def play(call: Call, device: torch.device, placed: Moved) -> list[Tensor]:
    with torch.no_grad():
        return call.run(device, moved=placed)


def differentiate(call: Call, device: torch.device, placed: Moved) -> list[Tensor]:
    """Gradients of every float input for a small, fixed incoming gradient."""
    inputs = [leaf for leaf in tree_flatten(placed)[0] if _is_float(leaf)]
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


def differentiable(call: Call) -> bool:
    inputs = [tensor for tensor in call.tensors() if tensor.is_floating_point()]
    return bool(inputs) and not call.mutates and not call.is_view and call.has_defined_value


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def put(context: CheckContext, questions: Sequence[Question]) -> list[Held]:
    """Ask the chip all of them in one session; nothing but its own work is in it: on a simulated chip over the CPU whatever runs
    inside a session is computed by the chip."""
    device = context.accelerator.device
    placed = [one.call.place(device) for one in questions]
    with context.chip():
        answers = []
        for place, (one, inputs) in enumerate(zip(questions, placed, strict=True)):
            context.progress(len(questions) + place, 2 * len(questions))
            answers.append(_answer(one, device, inputs))
    return [hold(one, answer) for one, answer in zip(questions, answers, strict=True)]


def _answer(one: Question, device: torch.device, inputs: Moved) -> list[Tensor] | str:
    """The chip's outputs, or what it raised."""
    try:
        return one.runner(one.call, device, inputs)
    except (RuntimeError, DeviceFault) as error:
        return describe(error)


def hold(one: Question, answer: Sequence[Tensor] | str) -> Held:
    if isinstance(answer, str):
        missed = Miss(one.call, 0, f"the chip raised {answer}", None, None)
        held = Held(0, 0.0, one.call.name, (missed,))
    else:
        held = hold_call(one.call, answer, one.exact, one.plain, one.nudged)
    differentiated = one.runner is differentiate
    misses = tuple(replace(miss, differentiated=differentiated) for miss in held.misses)
    return replace(held, misses=misses)


def shrunk(context: CheckContext, miss: Miss) -> Miss:
    """The smallest call found that is still answered wrongly; `miss` itself where no smaller one is (a fault that comes and goes)."""
    runner = differentiate if miss.differentiated else play
    ends_s, left = time.monotonic() + SHRINK_S, SHRINK_TRIES
    smaller = True
    while smaller:
        smaller = False
        for call in _smaller(miss.call):
            left -= 1
            if left < 0 or time.monotonic() > ends_s:
                return miss
            if found := _fails(context, call, runner):
                miss, smaller = found, True
                break
    return miss


def _fails(context: CheckContext, call: Call, runner: Runner) -> Miss | None:
    one = question(context.seed, call, runner)
    if one is None:
        return None
    try:
        return next(iter(put(context, [one])[0].misses), None)
    except ChipFailed:
        return None


def _smaller(call: Call) -> Iterator[Call]:
    """The call with one of its sizes halved or one less, wherever that size occurs; whole numbers of that value once kept, once cut."""
    sizes = sorted({size for tensor in call.tensors() for size in tensor.shape if size > 1})
    for size in reversed(sizes):
        for less in dict.fromkeys((size // 2, size - 1)):
            kept = _cut(call, size, less, numbers=False)
            yield kept
            cut = _cut(call, size, less, numbers=True)
            if cut.signature != kept.signature:
                yield cut


def _cut(call: Call, size: int, less: int, *, numbers: bool) -> Call:
    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[tuple(slice(less if n == size else None) for n in leaf.shape)]
        return less if numbers and type(leaf) is int and leaf == size else leaf

    args, kwargs = tree_map(change, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs, signature=signature_of(call.op, args, kwargs))
