"""The same work with a known answer, again and again: how rare a corruption could this have seen?

Each repetition is held bit by bit against the first, which another repetition confirms. n clean repetitions do not say "no
corruption"; they say that a rate above 3/n per repetition would have shown itself with 95 % confidence (the rule of three).
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bascule.qualify import workload
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

QUICK_REPEATS = 12
FULL_SECONDS = 300.0


def training(context: CheckContext) -> list[Evidence]:
    """Gradients of one fixed batch. Step numbers run on, as in a training that lasts."""
    work = context.workload
    model = work.model_on(context.accelerator)
    batch = context.accelerator.to_device(work.batch(1))

    def once(step: int) -> str:
        with context.chip(step=step):
            result = workload.forward_backward(model, batch)
            return digest(value.cpu() for value in result.grads.values())

    return _soak(context, once, "gradient computations")


def inference(context: CheckContext) -> list[Evidence]:
    work = context.workload
    model = work.model_on(context.accelerator)
    tokens = context.accelerator.to_device(work.batch(1)["tokens"])

    def once(step: int) -> str:
        with context.chip(step=step), torch.no_grad():
            return digest([work.prefill_and_decode(model, tokens, steps=4).cpu()])

    return _soak(context, once, "prefill-and-decode passes")


def _soak(context: CheckContext, once: Callable[[int], str], what: str) -> list[Evidence]:
    seen: list[str] = []
    ends_s = time.monotonic() + FULL_SECONDS
    while len(seen) < QUICK_REPEATS or (not context.quick and time.monotonic() < ends_s):
        seen.append(once(len(seen) + 1))
    counts = Counter(seen)
    usual, agreeing = counts.most_common(1)[0]
    wrong = len(seen) - agreeing
    measured: Measured = {
        "repetitions": len(seen),
        "differing": wrong,
        "rate_seen_with_95_percent": 3.0 / len(seen),
    }
    if wrong:
        first = next(place for place, one in enumerate(seen, start=1) if one != usual)
        return [
            context.failed(
                f"{wrong} of {len(seen)} equal {what} gave other bits, first at repetition {first}",
                measured,
            )
        ]
    return [
        context.passed(
            f"{len(seen)} equal {what}, all bit-equal: a corruption of more than {3.0 / len(seen):.1%} of them would have shown with 95 % confidence",
            measured,
        )
    ]


def digest(tensors: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
