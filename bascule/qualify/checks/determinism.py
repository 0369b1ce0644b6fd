"""The same work twice, the same bits? Replay, resume and verified continuation all rest on this."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bascule import numerics
from bascule.qualify import pinpoint, workload
from bascule.qualify.context import CheckContext, Measured
from bascule.qualify.hold import same_bits
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

    model = work.model_on(context.accelerator)
    return _repeat(context, two_steps, {}, lambda: workload.forward_backward(model, batches[0]))


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
        lambda: work.prefill_and_decode(model, tokens_BT, steps=4),
    )


def _repeat(
    context: CheckContext,
    run: Callable[[], dict[str, Tensor]],
    extra: Measured,
    part: pinpoint.Run,
) -> list[Evidence]:
    """`part` of the run, without a session of its own, is looked through for the operator that is not steady."""
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
            words, script = pinpoint.hand_over(context, pinpoint.unsteady_call(context, part))
            detail = f"{name} differs between equal runs (relative {error:.1e}; {len(differing)} of {len(first)} tensors differ, repeat {repeat}){words}"
            return [context.failed(detail, measured, script=script)]
    words = f"{len(first)} tensors bit-equal in {REPEATS} runs"
    if extra:
        words += (
            "; a row alone gives the bits it gives in a batch"
            if extra["batch_invariant"]
            else f"; a row alone differs from itself in a batch by {extra['batch_gap']:.1e}"
        )
    return [context.passed(words, {"tensors": len(first), **extra})]
