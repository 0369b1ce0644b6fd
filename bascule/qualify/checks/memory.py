"""Can the memory be used, does it hold what is written, and does it stay level over steps?"""

from __future__ import annotations

import torch
from torch import Tensor

from bascule import draws
from bascule.model.transformer import Transformer
from bascule.qualify import workload
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

QUICK_BYTES = 64 * 2**20
FULL_SHARE = 0.8  # of what is free; the rest is the runtime's
FULL_BYTES_ON_HOST = 2**30  # other processes live in the host's memory
BLOCK_BYTES = 16 * 2**20
PATTERNS = (0x00000000, 0x7FFFFFFF, 0x55555555, 0x2AAAAAAA)
CHURN_BLOCKS, CHURN_TOP, CHURN_KEEPS = 512, 8 * 2**20, 0.9
LEAK_ROUNDS = 2
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


def fragmentation(context: CheckContext) -> list[Evidence]:
    """The largest single block that can be had, before and after blocks of many sizes were taken and every other one given back."""
    accelerator = context.accelerator
    if accelerator.device.type == "cpu":
        return [
            context.skipped(
                "cannot be asked of a CPU: its memory is paged, so that a block in one piece says nothing"
            )
        ]
    free = (accelerator.memory().total_bytes or 0) - (accelerator.memory().allocated_bytes or 0)
    if free <= 0:
        return [context.skipped("the chip does not tell how much memory is free")]
    before = _largest_block(context, free)
    with context.chip():
        held = []
        sizes = draws.integers(draws.key(context.seed, "qualify.churn"), CHURN_TOP, CHURN_BLOCKS)
        for place, size in enumerate(sizes.tolist()):
            held.append(torch.empty(size + 1, dtype=torch.uint8, device=accelerator.device))
            if place % 2:
                held.pop(place // 4)
        held.clear()
    accelerator.empty_cache()
    after = _largest_block(context, free)
    measured: Measured = {"largest_before_bytes": before, "largest_after_bytes": after}
    words = f"largest block {after / 2**20:.0f} MiB after churn, {before / 2**20:.0f} MiB before"
    if after < CHURN_KEEPS * before:
        return [context.failed(words, measured)]
    return [context.passed(words, measured)]


def _largest_block(context: CheckContext, most: int) -> int:
    """Bytes, to a 64th of `most`, by halving."""
    low, high = 0, most
    while high - low > most // 64:
        middle = (low + high) // 2
        try:
            with context.session(context.work()):
                torch.empty(middle, dtype=torch.uint8, device=context.accelerator.device)
            low = middle
        except torch.OutOfMemoryError:
            high = middle
        context.accelerator.empty_cache()
    return low


def leak(context: CheckContext) -> list[Evidence]:
    """Memory after each of some equal training steps; what it grew by after the first ones.

    Growth is asked a second time before it is a finding: an allocator that settles late grows once (2 of 61 clean batteries in
    one process), a leak again.
    """
    work = context.workload
    model = work.model_on(context.accelerator)
    batch = context.accelerator.to_device(work.batch(1))
    for _ in range(LEAK_ROUNDS):
        used = _levels(context, model, batch)
        if used is None:
            words = (
                "the chip does not tell how much memory is in use; steps ran without running out"
            )
            return [context.skipped(words, {"steps": LEAK_STEPS})]
        # Growth in both halves: memory freed before hides a leak only for a while.
        middle = (LEAK_WARMUP + LEAK_STEPS) // 2
        early, late = used[middle] - used[LEAK_WARMUP], used[-1] - used[middle]
        grown = early + late
        slope = grown / (LEAK_STEPS - 1 - LEAK_WARMUP)
        measured: Measured = {"bytes_per_step": slope, "grown_bytes": grown, "steps": LEAK_STEPS}
        if not (
            slope > LEAK_BYTES_PER_STEP and late > LEAK_BYTES_PER_STEP * (LEAK_STEPS - 1 - middle)
        ):
            break
    else:
        return [context.failed(f"memory grows by {slope / 2**20:.2f} MiB a step", measured)]
    return [
        context.passed(
            f"memory level over {LEAK_STEPS} steps ({grown / 2**20:+.1f} MiB after the first {LEAK_WARMUP})",
            measured,
        )
    ]


def _levels(
    context: CheckContext, model: Transformer, batch: dict[str, Tensor]
) -> list[int] | None:
    """Bytes in use after each of LEAK_STEPS steps, from a trimmed heap; None where the chip does not tell."""
    used: list[int] = []
    context.accelerator.empty_cache()
    for _ in range(LEAK_STEPS):
        with context.chip():
            workload.forward_backward(model, batch)
        allocated = context.accelerator.memory().allocated_bytes
        if allocated is None:
            return None
        used.append(allocated)
    return used
