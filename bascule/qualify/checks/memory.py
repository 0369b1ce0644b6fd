"""Can the memory be used, does it hold what is written, and does it stay level over steps?"""

from __future__ import annotations

import torch

from bascule.qualify import workload
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

QUICK_BYTES = 64 * 2**20
FULL_SHARE = 0.8  # of what is free; the rest is the runtime's
FULL_BYTES_ON_HOST = 2**30  # other processes live in the host's memory
BLOCK_BYTES = 16 * 2**20
PATTERNS = (0x00000000, 0x7FFFFFFF, 0x55555555, 0x2AAAAAAA)
LEAK_STEPS = 28
LEAK_WARMUP = 8
LEAK_BYTES_PER_STEP = (
    256 * 1024
)  # the allocator's own wobble stays below; 4 MB a step fills 64 GB in a night


def capacity(context: CheckContext) -> list[Evidence]:
    """Fill blocks with patterns and with their own addresses, hold all of them at once, then read all back."""
    accelerator = context.accelerator
    total = accelerator.memory().total_bytes
    wanted = QUICK_BYTES
    if not context.quick and accelerator.device.type == "cpu":
        wanted = FULL_BYTES_ON_HOST
    elif not context.quick and total:
        wanted = int(FULL_SHARE * (total - (accelerator.memory().allocated_bytes or 0)) / 2)
    blocks = max(1, wanted // BLOCK_BYTES)
    words = BLOCK_BYTES // 4
    wrong = 0
    device = accelerator.device
    with context.chip():
        for pattern in PATTERNS if context.quick else (*PATTERNS, 0x0F0F0F0F):
            held = [
                torch.full((words,), pattern, dtype=torch.int32, device=device)
                for _ in range(blocks)
            ]
            wrong += sum(int((block != pattern).sum()) for block in held)
            del held
        held = [
            torch.arange(words, dtype=torch.int32, device=device).add_(place)
            for place in range(blocks)
        ]
        wrong += sum(
            int((block - place != torch.arange(words, dtype=torch.int32, device=device)).sum())
            for place, block in enumerate(held)
        )
        del held
    accelerator.empty_cache()
    measured: Measured = {"bytes": blocks * BLOCK_BYTES, "wrong_words": wrong, "total_bytes": total}
    if wrong:
        return [
            context.failed(
                f"{wrong} words read back other than written, in {blocks * BLOCK_BYTES / 2**20:.0f} MiB",
                measured,
            )
        ]
    held_words = f"{blocks * BLOCK_BYTES / 2**20:.0f} MiB held and read back right"
    return [
        context.passed(
            held_words + ("" if context.quick is False else " (quick: not the whole memory)"),
            measured,
        )
    ]


def leak(context: CheckContext) -> list[Evidence]:
    """Memory after each of some equal training steps; what it grew by after the first ones."""
    work = context.workload
    accelerator = context.accelerator
    model = work.model_on(accelerator)
    batch = accelerator.to_device(work.batch(1))
    used: list[int] = []
    accelerator.empty_cache()
    for _ in range(LEAK_STEPS):
        with context.chip():
            workload.forward_backward(model, batch)
        allocated = accelerator.memory().allocated_bytes
        if allocated is None:
            return [
                context.passed(
                    "the chip does not tell how much memory is in use; steps ran without running out",
                    {"steps": LEAK_STEPS},
                )
            ]
        used.append(allocated)
    # Growth in both halves: an allocator that settles late grows once, and memory freed before hides a leak only for a while.
    middle = (LEAK_WARMUP + LEAK_STEPS) // 2
    early, late = used[middle] - used[LEAK_WARMUP], used[-1] - used[middle]
    grown = early + late
    slope = grown / (LEAK_STEPS - 1 - LEAK_WARMUP)
    measured: Measured = {"bytes_per_step": slope, "grown_bytes": grown, "steps": LEAK_STEPS}
    if slope > LEAK_BYTES_PER_STEP and late > LEAK_BYTES_PER_STEP * (LEAK_STEPS - 1 - middle):
        return [context.failed(f"memory grows by {slope / 2**20:.2f} MiB a step", measured)]
    return [
        context.passed(
            f"memory level over {LEAK_STEPS} steps ({grown / 2**20:+.1f} MiB after the first {LEAK_WARMUP})",
            measured,
        )
    ]
