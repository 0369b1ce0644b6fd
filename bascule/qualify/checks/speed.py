"""How fast, and how steady? Figures to read and to plan with; no bar, because slow is a price and not a fault."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bascule.accelerators.base import Accelerator
from bascule.qualify import workload
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

GEMM_SIZE = 512
COPY_BYTES = 32 * 2**20
STEPS = 8


def step(context: CheckContext) -> list[Evidence]:
    """Products, memory and the model's own step on the chip, and the same on the reference where it is another chip."""
    chip = _measure(context, context.accelerator)
    measured: Measured = dict(chip)
    words = f"{chip['gemm_gflops']:.1f} GFLOP/s, {chip['copy_gb_per_s']:.1f} GB/s, {chip['tokens_per_s']:.0f} tokens/s, steps vary by {chip['jitter']:.0%}"
    if context.accelerator.device != context.referee.device or context.accelerator.info().simulated:
        reference = _measure(context, context.referee)
        ratio = chip["tokens_per_s"] / reference["tokens_per_s"]
        measured |= {f"reference_{name}": value for name, value in reference.items()}
        measured["step_speed_ratio"] = ratio
        words += f"; the step runs at {ratio:.2f} times the reference's speed"
    return [context.passed(words, measured)]


def _measure(context: CheckContext, accelerator: Accelerator) -> dict[str, float]:
    work = context.workload
    model = accelerator.move(work.new_model())
    optimizer = work.optimizer(model)
    batch = accelerator.to_device(work.batch(1))
    a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(accelerator.device)
    block = torch.zeros(COPY_BYTES // 4, device=accelerator.device)

    def model_step() -> object:
        if context.role == "infer":
            with torch.no_grad():
                return work.prefill_and_decode(model, batch["tokens"], steps=4)
        return workload.train_step(model, optimizer, batch)

    with accelerator.session(context.work()):
        gemm_s = _median_s(accelerator, lambda: a @ a)
        copy_s = _median_s(accelerator, block.clone)
        times = np.array([accelerator.timed(model_step)[1] for _ in range(STEPS)][1:])
    rows = batch["tokens"].shape[0]
    tokens = batch["tokens"].numel() if context.role == "train" else rows * 4
    return {
        "gemm_gflops": 2.0 * GEMM_SIZE**3 / gemm_s / 1e9,
        "copy_gb_per_s": 2.0 * COPY_BYTES / copy_s / 1e9,
        "tokens_per_s": tokens / float(np.median(times)),
        "jitter": float((times.max() - times.min()) / np.median(times)),
    }


def _median_s(accelerator: Accelerator, fn: Callable[[], object]) -> float:
    fn()
    return float(np.median([accelerator.timed(fn)[1] for _ in range(5)]))
