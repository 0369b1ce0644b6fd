"""The same work with a known answer, again and again: how rare a corruption could this have seen?

Each repetition is held bit by bit against the others of the same input. n clean repetitions do not say "no
corruption"; they say that a rate above 3/n per repetition would have shown itself with 95 % confidence (the rule of three).
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bascule.qualify import pinpoint, workload
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

QUICK_REPEATS = 12
INPUTS = 3  # different batches in turn: a bad unit may fail for some values only
FULL_SECONDS = 300.0


def training(context: CheckContext) -> list[Evidence]:
    """Gradients at fixed weights. Step numbers run on, as in a training that lasts."""
    work = context.workload
    model = work.model_on(context.accelerator)
    batches = [context.accelerator.to_device(work.batch(place + 1)) for place in range(INPUTS)]

    def once(step: int, place: int) -> str:
        with context.chip(step=step):
            result = workload.forward_backward(model, batches[place])
            return digest(value.cpu() for value in result.grads.values())

    def part(place: int) -> object:
        return workload.forward_backward(model, batches[place])

    return _soak(context, once, part, "gradient computations")


def inference(context: CheckContext) -> list[Evidence]:
    work = context.workload
    model = work.model_on(context.accelerator)
    batches = [
        context.accelerator.to_device(work.batch(place + 1)["tokens"]) for place in range(INPUTS)
    ]

    def once(step: int, place: int) -> str:
        with context.chip(step=step), torch.no_grad():
            return digest([work.prefill_and_decode(model, batches[place], steps=4).cpu()])

    def part(place: int) -> object:
        with torch.no_grad():
            return work.prefill_and_decode(model, batches[place], steps=4)

    return _soak(context, once, part, "prefill-and-decode passes")


def _soak(
    context: CheckContext,
    once: Callable[[int, int], str],
    part: Callable[[int], object],
    what: str,
) -> list[Evidence]:
    """`once(step, place)` works input `place` through under a step number; `part(place)` is the same without a session."""
    seen: list[list[str]] = [[] for _ in range(INPUTS)]
    steps = 0
    ends_s = time.monotonic() + FULL_SECONDS
    while steps < QUICK_REPEATS or (not context.quick and time.monotonic() < ends_s):
        if not context.quick:
            spent_s = FULL_SECONDS - max(0.0, ends_s - time.monotonic())
            context.progress(round(spent_s), round(FULL_SECONDS))
        place = steps % INPUTS
        steps += 1
        seen[place].append(once(steps, place))
    # The answer given most often is taken for right; of a chip that never agrees with itself, one in a batch's answers.
    usual = [Counter(answers).most_common(1)[0][0] for answers in seen]
    wrong = sum(answer != usual[place] for place, answers in enumerate(seen) for answer in answers)
    measured: Measured = {
        "repetitions": steps,
        "inputs": INPUTS,
        "differing": wrong,
        "rate_seen_with_95_percent": 3.0 / steps,
    }
    if wrong:
        first = min(
            turn * INPUTS + place + 1
            for place, answers in enumerate(seen)
            for turn, answer in enumerate(answers)
            if answer != usual[place]
        )
        place = (first - 1) % INPUTS
        right = next(
            turn * INPUTS + place + 1
            for turn, answer in enumerate(seen[place])
            if answer == usual[place]
        )
        miss = pinpoint.unsteady_call(context, lambda: part(place), (right, first))
        words, script = pinpoint.hand_over(context, miss)
        detail = f"{wrong} of {steps} repeated {what} gave other bits than their equals, first at repetition {first}{words}"
        return [context.failed(detail, measured, script=script)]
    words = f"{steps} {what} on {INPUTS} inputs, all bit-equal when repeated: a corruption of more than {3.0 / steps:.1%} of them would have shown with 95 % confidence"
    return [context.passed(words, measured)]


def digest(tensors: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
