"""Can a training leave this chip and come back? Snapshot here, restore on the reference, snapshot there, restore here.

State must survive every hop bit for bit. The step after the hop must be the step without it: on the chip bit-equal if the chip is
deterministic, and on the reference within the response to one ulp: that is what makes a later migration provable at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bascule import numerics
from bascule.accelerators.base import Accelerator
from bascule.model.transformer import Transformer
from bascule.qualify import pinpoint, workload
from bascule.qualify.checks.layers import nudged
from bascule.qualify.context import CheckContext, Measured
from bascule.qualify.hold import same_bits
from bascule.records import Evidence
from bascule.train import checkpoint
from bascule.train.optimizer import SplitOptimizer

STEPS_BEFORE = 2
RESPONSE_MARGIN = 2.0  # times the type's own margin, as for gradients


def roundtrip(context: CheckContext) -> list[Evidence]:
    work, chip, referee = context.workload, context.accelerator, context.referee
    model = work.model_on(chip)
    optimizer = work.optimizer(model)
    batches = [chip.to_device(work.batch(step)) for step in range(1, STEPS_BEFORE + 1)]
    with context.chip():
        for batch in batches:
            workload.train_step(model, optimizer, batch)
    there_model, there_optimizer = _hop(context, model, optimizer, referee, "from-chip")
    back_model, back_optimizer = _hop(context, there_model, there_optimizer, chip, "from-reference")
    here = _state(model, optimizer)
    there = _state(there_model, there_optimizer)
    back = _state(back_model, back_optimizer)
    lost = [
        name
        for name in here
        if not (same_bits(here[name], there[name]) and same_bits(here[name], back[name]))
    ]
    if lost:
        return [
            context.failed(
                f"{lost[0]} is not the same after a snapshot and a restore ({len(lost)} of {len(here)} tensors)",
                {"tensor": lost[0], "lost": len(lost)},
            )
        ]
    return [_next_step(context, model, back_model, there_model, len(here))]


def _next_step(
    context: CheckContext, stayed: Transformer, back: Transformer, there: Transformer, tensors: int
) -> Evidence:
    """Gradients of the next step: of the model that stayed, the one that came back, and the one on the reference."""
    batch = context.workload.batch(STEPS_BEFORE + 1)
    batch_chip = context.accelerator.to_device(batch)
    with context.chip():
        first = _gradients(stayed, batch_chip)
        again = _gradients(back, batch_chip)
    reference = _gradients(there, batch)
    moved = _gradients(nudged(there, context.seed), batch)
    differing = [name for name in first if not same_bits(first[name], again[name])]
    allowed = numerics.tolerance(context.workload.dtype)
    margin = RESPONSE_MARGIN * allowed.margin
    ratios = {
        name: numerics.scale_free_error(first[name], reference[name])
        / max(numerics.scale_free_error(moved[name], reference[name]), allowed.unit)
        for name in first
    }
    worst = max(ratios, key=lambda name: ratios[name])
    measured: Measured = {
        "tensors": tensors,
        "differing_after_return": len(differing),
        "worst_ratio": ratios[worst],
        "worst_tensor": worst,
    }

    def again_here() -> object:
        return workload.forward_backward(stayed, batch_chip)

    if differing:
        words, script = pinpoint.hand_over(context, pinpoint.unsteady_call(context, again_here))
        return context.failed(
            f"the step after a snapshot and a restore is another step: the gradient of {differing[0]} differs ({len(differing)} differ){words}",
            measured,
            script=script,
        )
    if not ratios[worst] <= margin:
        words, script = pinpoint.hand_over(context, pinpoint.wrong_call(context, again_here))
        return context.failed(
            f"the reference continues otherwise: gradient of {worst} differs by {ratios[worst]:.1f} times the response to one ulp, allowed {margin:g}{words}",
            measured,
            script=script,
        )
    return context.passed(
        f"{tensors} tensors bit-equal through both restores; the next step is the same here and {ratios[worst]:.2f} times the response to one ulp off there",
        measured,
    )


def _gradients(model: Transformer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: grad.cpu() for name, grad in workload.forward_backward(model, batch).grads.items()
    }


def _state(model: Transformer, optimizer: SplitOptimizer) -> dict[str, Tensor]:
    """Weights, router biases and optimizer state, on the CPU."""
    moments = {
        f"optimizer {name}": torch.as_tensor(value)
        for name, value in optimizer.state_dict().items()
    }
    return {
        name: value.detach().cpu() for name, value in (dict(model.state_dict()) | moments).items()
    }


def _hop(
    context: CheckContext, model: Transformer, optimizer: SplitOptimizer, to: Accelerator, name: str
) -> tuple[Transformer, SplitOptimizer]:
    """Save a snapshot as a run does, and restore it on `to`."""
    # Cloned, because tied weights share memory and a snapshot file may not.
    weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    folder = context.workdir / "resume" / name
    path = checkpoint.save_snapshot(folder, STEPS_BEFORE, weights, optimizer.state_dict(), {}, {})
    snapshot = checkpoint.load(path)
    restored = context.workload.new_model(
        seed=context.seed + 1
    )  # other weights: a restore that does nothing is seen
    restored.load_state_dict(snapshot.model)
    restored = to.move(restored)
    restored_optimizer = context.workload.optimizer(restored)
    restored_optimizer.load_state_dict(snapshot.optimizer)
    return restored, restored_optimizer
