"""How fast, how steady, and for how long? Figures to read and to plan with; no bar, because slow is a price and not a fault.

Products of several sizes and a copy give the measured roofline; where the chip has a row in the plan's catalogue its datasheet stands
beside it. *Burst* is the best tenth of a stretch of products without a pause, *sustained* the median of its last third: what lies between
is throttling, as far as so short a stretch can show it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from bascule.accelerators.base import Accelerator
from bascule.model import count
from bascule.plan.catalogue import Chip, chips
from bascule.qualify import workload
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

SIZES_ON_HOST = (64, 128, 256, 512)
SIZES = (256, 1024, 4096)
ATTENTION_BHTD = (1, 8, 512, 64)
COPY_BYTES = 32 * 2**20
STEPS = 8
# A larger product takes up to 64 times as long: past this none is asked, so that a slow chip is not taken for one that hangs.
LONG_PRODUCT_S = 0.1
STRETCH_S, FULL_STRETCH_S = 0.4, 30.0


def step(context: CheckContext) -> list[Evidence]:
    """Products, memory and the model's own step on the chip, and the same on the reference where it is another chip."""
    accelerator = context.accelerator
    chip = _measure(context, accelerator)
    roof = _roofline(context)
    steady = _stretch(context, roof[-1][0])
    measured: Measured = {**chip, **steady, "gemm_gflops": max(rate for _, _, rate in roof)}
    words = (
        f"{measured['gemm_gflops']:.1f} GFLOP/s in products ({steady['sustained_share']:.0%} of it sustained over {steady['stretch_s']:.2g} s), "
        f"{chip['copy_gb_per_s']:.1f} GB/s, {chip['tokens_per_s']:.0f} tokens/s, steps vary by {chip['jitter']:.0%}"
    )
    link = _host_link(accelerator)
    measured |= link
    words += (
        f"; host link {link['to_chip_gb_per_s']:.1f} GB/s in and {link['from_chip_gb_per_s']:.1f} out"
        if link
        else "; no host link to measure (the chip is the host)"
    )
    known = datasheet(accelerator.info().name)
    if known:
        measured |= {"datasheet_chip": known.name, "datasheet_bf16_tflops": known.bf16_tflops, "datasheet_memory_tbs": known.memory_tbs}  # fmt: skip
        words += f"; the datasheet of {known.name} says {known.bf16_tflops} TFLOP/s bf16 and {known.memory_tbs} TB/s"
    if accelerator.device != context.referee.device or accelerator.info().simulated:
        reference = _measure(context, context.referee)
        ratio = chip["tokens_per_s"] / reference["tokens_per_s"]
        measured |= {f"reference_{name}": value for name, value in reference.items()}
        measured["step_speed_ratio"] = ratio
        words += f"; the step runs at {ratio:.2f} times the reference's speed"
    if context.needs and context.role == "train":
        needed = float(context.needs["plan_gflops"])
        measured |= {**context.needs, "plan_share": chip["step_gflops"] / needed}
        words += (
            f"; the plan counts on {needed:.3g} GFLOP/s in the {context.needs['plan_phase']} step "
            f"({float(context.needs['plan_step_s']):.3g} s), measured {chip['step_gflops']:.3g} ({chip['step_gflops'] / needed:.0%} of it)"
        )
    context.draw({"products": roof, "copy_gb_per_s": chip["copy_gb_per_s"], "datasheet": known and [known.name, known.bf16_tflops, known.memory_tbs],
                  "step": [chip["step_gflops"]]})  # fmt: skip
    return [context.passed(words, measured)]


def datasheet(name: str) -> Chip | None:
    """The catalogue's row for what a driver calls the chip: `NVIDIA H100 80GB HBM3` is an H100."""
    squeezed = re.sub(r"[^A-Z0-9]", "", name.upper())
    rows: dict[str, Chip] = {}
    for key, chip in chips().items():
        words = re.split(r"[ -]", key.upper())
        has_number = any(map(str.isdigit, words[0]))
        rows.setdefault(words[0] if has_number else "".join(words[:2]), chip)
    return rows.get(max((word for word in rows if word in squeezed), key=len, default=""))


def _measure(context: CheckContext, accelerator: Accelerator) -> dict[str, float]:
    work = context.workload
    model = accelerator.move(work.new_model())
    optimizer = work.optimizer(model)
    batch = accelerator.to_device(work.batch(1))
    block = torch.zeros(COPY_BYTES // 4, device=accelerator.device)
    q = torch.zeros(ATTENTION_BHTD, dtype=work.dtype, device=accelerator.device)

    def model_step() -> object:
        if context.role == "infer":
            with torch.no_grad():
                return work.prefill_and_decode(model, batch["tokens"], steps=4)
        return workload.train_step(model, optimizer, batch)

    on_chip = accelerator is context.accelerator
    with context.session(context.work()) if on_chip else accelerator.session(context.work()):
        copy_s = _median_s(accelerator, block.clone)
        attention_s = _median_s(accelerator, lambda: F.scaled_dot_product_attention(q, q, q))
        times = np.array([accelerator.timed(model_step)[1] for _ in range(STEPS)][1:])
    rows, length = batch["tokens"].shape
    tokens = rows * length if context.role == "train" else rows * 4
    tokens_per_s = tokens / float(np.median(times))
    per_token = (
        count.train_flops_per_token(work.config, length)
        if context.role == "train"
        else count.decode_flops_per_token(work.config, length / 2)
    )
    b, h, t, d = ATTENTION_BHTD
    return {
        "copy_gb_per_s": 2.0 * COPY_BYTES / copy_s / 1e9,
        "attention_gflops": 4.0 * b * h * t * t * d / attention_s / 1e9,
        "tokens_per_s": tokens_per_s,
        "step_gflops": tokens_per_s * per_token / 1e9,
        "jitter": float((times.max() - times.min()) / np.median(times)),
    }


def _roofline(context: CheckContext) -> list[tuple[int, float, float]]:
    """(size, FLOP per byte moved, GFLOP/s) of square products in the model's type."""
    accelerator, dtype = context.accelerator, context.workload.dtype
    found: list[tuple[int, float, float]] = []
    for n in SIZES_ON_HOST if accelerator.device.type == "cpu" else SIZES:
        a = torch.full((n, n), 0.5, dtype=dtype, device=accelerator.device)
        with context.session(context.work()):
            seconds = _median_s(accelerator, lambda a=a: a @ a)  # type: ignore[misc]
        found.append((n, 2.0 * n / (3 * a.element_size()), 2.0 * n**3 / seconds / 1e9))
        if seconds > LONG_PRODUCT_S:
            break
    return found


def _stretch(context: CheckContext, n: int) -> dict[str, float]:
    accelerator = context.accelerator
    a = torch.full((n, n), 0.5, dtype=context.workload.dtype, device=accelerator.device)
    lasts_s = STRETCH_S if context.quick else FULL_STRETCH_S
    times: list[float] = []
    began_s = time.monotonic()
    with context.session(context.work()):
        while time.monotonic() - began_s < lasts_s or len(times) < 10:
            times.append(accelerator.timed(lambda: a @ a)[1])
    burst = float(np.quantile(times, 0.1))
    sustained = float(np.median(times[-max(1, len(times) // 3) :]))
    return {
        "burst_gflops": 2.0 * n**3 / burst / 1e9,
        "sustained_gflops": 2.0 * n**3 / sustained / 1e9,
        "sustained_share": burst / sustained,
        "stretch_s": lasts_s,
    }


def _host_link(accelerator: Accelerator) -> dict[str, float]:
    """GB/s each way, empty where the chip is the host."""
    if accelerator.device.type == "cpu":
        return {}
    here = torch.zeros(COPY_BYTES // 4).pin_memory()
    there = here.to(accelerator.device)
    return {
        "to_chip_gb_per_s": COPY_BYTES
        / _median_s(accelerator, lambda: here.to(there.device))
        / 1e9,
        "from_chip_gb_per_s": COPY_BYTES / _median_s(accelerator, there.cpu) / 1e9,
    }


def _median_s(accelerator: Accelerator, fn: Callable[[], object]) -> float:
    fn()
    return float(np.median([accelerator.timed(fn)[1] for _ in range(5)]))
