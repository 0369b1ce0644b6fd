"""The same work twice, the same bits? Replay, resume and verified continuation all rest on this."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bascule import numerics
from bascule.qualify import workload
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

REPEATS = 3


def training(context: CheckContext) -> list[Evidence]:
    """Two whole steps from the same start, several times: gradients and updated weights compared bit by bit."""
    work = context.workload
    batches = [context.accelerator.to_device(work.batch(step)) for step in (1, 2)]

    def two_steps() -> dict[str, Tensor]:
        model = work.model_on(context.accelerator)
        optimizer = work.optimizer(model)
        with context.chip():
            results = [workload.train_step(model, optimizer, batch) for batch in batches]
            grads = {f"gradient of {name}": grad.cpu() for name, grad in results[-1].grads.items()}
            return grads | {name: p.detach().cpu() for name, p in model.named_parameters()}

    return _repeat(context, two_steps, {})


def inference(context: CheckContext) -> list[Evidence]:
    """Prefill and decode from the same cache, several times. A row alone against the same row in a batch is reported, not judged:
    few chips promise it, and the sampler does not rely on it."""
    work = context.workload
    model = work.model_on(context.accelerator)
    tokens_BT = context.accelerator.to_device(work.batch(1)["tokens"])

    def decode(rows: Tensor) -> Tensor:
        with context.chip(), torch.no_grad():
            return work.prefill_and_decode(model, rows, steps=4).cpu()

    whole, alone = decode(tokens_BT), decode(tokens_BT[:1])
    gap = numerics.scale_free_error(alone, whole[:1])
    return _repeat(
        context,
        lambda: {"logits": decode(tokens_BT)},
        {"batch_gap": gap, "batch_invariant": int(gap == 0.0)},
    )


def _repeat(
    context: CheckContext, run: Callable[[], dict[str, Tensor]], extra: Measured
) -> list[Evidence]:
    first = run()
    for repeat in range(1, REPEATS):
        again = run()
        differing = [name for name in first if not same_bits(first[name], again[name])]
        if differing:
            name = differing[0]
            error = numerics.scale_free_error(again[name], first[name])
            measured: Measured = {
                "tensor": name,
                "differing": len(differing),
                "tensors": len(first),
                "error": error,
                **extra,
            }
            return [
                context.failed(
                    f"{name} differs between equal runs (relative {error:.1e}; {len(differing)} of {len(first)} tensors differ, repeat {repeat})",
                    measured,
                )
            ]
    words = f"{len(first)} tensors bit-equal in {REPEATS} runs"
    if extra:
        words += (
            "; a row alone gives the bits it gives in a batch"
            if extra["batch_invariant"]
            else f"; a row alone differs from itself in a batch by {extra['batch_gap']:.1e}"
        )
    return [context.passed(words, {"tensors": len(first), **extra})]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bytes: NaN equals the same NaN, 0 is not -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(
        torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    )
