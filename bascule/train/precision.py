"""What a run computes its steps in: asked of its recipe and of the chip that trains first, once, and kept for the whole run.

A precision belongs to the run and not to the chip: a resume, a fallback to another vendor's chip, a replay and the referee must compute the
very step that was computed, so a pool that would rather have the other type gets the run's all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from bascule.accelerators.base import Accelerator
from bascule.config.model import ModelConfig
from bascule.config.training import Precision
from bascule.ledger import Ledger, last
from bascule.model.precision import computing
from bascule.records import AnyRecord, TrainPrecision
from bascule.train import checkpoint

FASTER = 1.5
"""How many times faster bf16 must be. Below it rounding is not worth the time: a guard sees less in bf16 (docs/guard.md)."""

ROWS, LEAST_WIDTH, ROUNDS = 4096, 64, 3


def decide(
    asked: Literal["auto", "fp32", "bf16"], accelerator: Accelerator, model: ModelConfig
) -> TrainPrecision:
    """`auto` asks the chip, outside any session: on a CPU nothing is timed, there fp32 has kernels of its own (model/kernels.py)."""
    if asked != "auto":
        return TrainPrecision(precision=asked, reason="the recipe asks for it")
    if accelerator.device.type == "cpu":
        return TrainPrecision(precision="fp32", reason="a CPU trains first")
    try:
        ratio = _seconds("fp32", accelerator, model) / _seconds("bf16", accelerator, model)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        return TrainPrecision(precision="fp32", reason=f"{accelerator.name} could not compute the bf16 probe: {why}")  # fmt: skip
    taken: Precision = "bf16" if ratio >= FASTER else "fp32"
    reason = f"on {accelerator.name} a product of this model's width, forward and backward, is {ratio:.2f} times as fast in bf16 ({FASTER:g} wanted)"
    return TrainPrecision(precision=taken, reason=reason)


def settle(
    ledger: Ledger, snapshot: Path | None, decide: Callable[[], TrainPrecision]
) -> Precision:
    """The run's, from its ledger; decided and recorded where there is none yet. A `snapshot` to go on from that comes without its ledger (out of
    a store) brings its own; one of before there was a choice is of fp32."""
    settled = last(ledger.read(), TrainPrecision)
    if settled is None:
        if snapshot is None:
            settled = decide()
        else:
            kept = checkpoint.load(snapshot).extra.get("precision", "fp32")
            settled = TrainPrecision(precision=kept, reason=f"so were the steps before {snapshot.name}")  # fmt: skip
        ledger.append(settled)
    return settled.precision


def precision_of(records: Sequence[AnyRecord]) -> Precision:
    """What the steps of a run were computed in, from its ledger; fp32 where it says nothing (runs of before there was a choice)."""
    settled = last(records, TrainPrecision)
    return settled.precision if settled else "fp32"


def _seconds(precision: Precision, accelerator: Accelerator, model: ModelConfig) -> float:
    """The best of some rounds after one to warm up: one linear layer's three products, with the casts that a step has around them."""
    width = max(LEAST_WIDTH, model.hidden_size)
    inner = model.moe_intermediate_size if model.ffn == "moe" else model.intermediate_size
    wide = max(LEAST_WIDTH, inner)
    x = torch.ones(ROWS, width, device=accelerator.device, requires_grad=True)
    weight = torch.ones(wide, width, device=accelerator.device, requires_grad=True)

    def products() -> None:
        with computing(precision, accelerator.device):
            made = F.linear(x, weight)
        torch.autograd.grad(made, (x, weight), torch.ones_like(made))

    return min([accelerator.timed(products)[1] for _ in range(ROUNDS + 1)][1:])
