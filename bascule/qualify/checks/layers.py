"""Is every layer of this model right, forward and backward, within the model's own response to one unit in the last place?

The chip's fp32 model is held against its fp64 twin. The floor is measured: by how much the CPU's fp32 model misses the twin, and by
how much it moves when all weights move by one ulp (TTrace, arXiv 2506.09280). Nothing is a fixed 1e-3, and every tensor is judged
relative to its own size, so the gradient of a bias of 1e-6 counts as much as the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bascule import draws, numerics
from bascule.model.transformer import Transformer
from bascule.numerics import Comparison
from bascule.qualify import pinpoint, workload
from bascule.qualify.context import CheckContext, Measured
from bascule.qualify.hold import Miss, widest
from bascule.records import Evidence

# numerics.verdict allows 8 times the floor; two right chips may each lie one response off, on either side.
RESPONSE_MARGIN = 2.0
Look = Callable[[Transformer, dict[str, Tensor]], dict[str, Tensor]]


def forward(context: CheckContext) -> list[Evidence]:
    return _judge(
        context, _outputs if context.role == "train" else _outputs_without_grad, "output of"
    )


def gradients(context: CheckContext) -> list[Evidence]:
    return _judge(context, _gradients, "gradient of")


def _outputs_without_grad(model: Transformer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return _outputs(model, batch)


def _outputs(model: Transformer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output of every block, and the logits."""
    seen: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(
            lambda _module, _inputs, out, name=f"layer {place}": seen.__setitem__(
                name, out.x_BTD.detach()
            )
        )
        for place, block in enumerate(model.model.layers)
    ]
    try:
        seen["logits"] = model(batch["tokens"]).logits_BTV.detach()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _gradients(model: Transformer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return workload.forward_backward(model, batch).grads


def _judge(context: CheckContext, look: Look, what: str) -> list[Evidence]:
    work = context.workload
    batch = work.batch(1)
    exact = look(work.twin, batch)
    plain_model = work.new_model()
    plain = look(plain_model, batch)
    moved = look(nudged(plain_model, context.seed), batch)
    on_chip = work.model_on(context.accelerator)
    batch_on_chip = context.accelerator.to_device(batch)
    with context.chip():
        answer = {name: value.cpu() for name, value in look(on_chip, batch_on_chip).items()}
    findings = []
    worst, where = 0.0, ""
    for name, want in exact.items():
        floor = _floor(want, plain[name], moved[name])
        found = numerics.compare(answer[name], want)
        why = numerics.verdict(found, floor, plain[name].dtype)
        if why:
            findings.append((name, why, found, floor))
        if floor.rms and found.rms / floor.rms > worst:
            worst, where = found.rms / floor.rms, name
    if findings:
        carried = pinpoint.wrong_call(context, lambda: look(on_chip, batch_on_chip))
        return [_finding(context, what, findings, len(exact), carried)]
    detail = f"{what} all {len(exact)} right; largest error {worst:.2f} times the response to one ulp ({where})"
    return [context.passed(detail, {"tensors": len(exact), "worst_ratio": worst})]


def _floor(exact: Tensor, plain: Tensor, nudged: Tensor) -> Comparison:
    floor = widest(
        numerics.rounding_floor(exact, plain.dtype),
        numerics.compare(plain, exact),
        numerics.compare(nudged, plain),
    )
    return replace(floor, rms=RESPONSE_MARGIN * floor.rms, tail=RESPONSE_MARGIN * floor.tail)


def nudged(model: Transformer, seed: int) -> Transformer:
    """Move every weight by one ulp, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                numerics.perturb_one_ulp(parameter, draws.key(seed, f"qualify.layers/{name}"))
            )
    return model


def _finding(
    context: CheckContext,
    what: str,
    findings: list[tuple[str, str, Comparison, Comparison]],
    total: int,
    carried: Miss | None,
) -> Evidence:
    """The first wrong tensor in the model's order is nearest to the cause of a forward error, the last to a backward one."""
    name, why, found, floor = findings[0] if what.startswith("output") else findings[-1]
    measured: Measured = {
        "tensor": name,
        "wrong_tensors": len(findings),
        "tensors": total,
        "rms": found.rms,
        "gain": found.gain,
        "gain_z": found.gain_z,
        "tail": found.tail,
        "nonfinite": found.nonfinite,
        "floor_rms": floor.rms,
    }
    words, script = pinpoint.hand_over(context, carried)
    detail = f"{what} {name}: {why} ({len(findings)} of {total} wrong){words}"
    return context.failed(detail, measured, script=script)
