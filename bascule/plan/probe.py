"""A quick look at this machine's own speed, so that a CPU (which no datasheet row covers) can be planned honestly."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits


@dataclass(frozen=True)
class MachineSpeed:
    """fp32 matrix products of this machine. `cold_flops_per_s` uses the small widths that tiny models have."""

    warm_flops_per_s: float
    cold_flops_per_s: float
    memory_bytes: int | None


@functools.cache
def measure_cpu(budget_s: float = 0.15) -> MachineSpeed:
    """Time two matrix sizes with numpy, best of several within the budget; cached for the process.

    One thread, which is what the planner's shares were taken on. Two threads wait for each other, and where something else
    uses a core they wait for a time slice: a product of 60 microseconds then takes 10 ms, and a demo is priced at a day.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        return MachineSpeed(
            warm_flops_per_s=_matmul_rate(512, 512, budget_s / 2),
            cold_flops_per_s=_matmul_rate(256, 96, budget_s / 2),
            memory_bytes=host_memory_bytes(),
        )


def _matmul_rate(rows: int, width: int, budget_s: float) -> float:
    a = np.ones((rows, width), dtype=np.float32)
    b = np.ones((width, width), dtype=np.float32)
    a @ b
    best, tries, end = float("inf"), 0, time.perf_counter() + budget_s
    # Five tries at least: on a busy machine the budget is gone within one, and a tiny model is priced at days.
    while tries < 5 or time.perf_counter() < end:
        tries += 1
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * rows * width * width / best


def host_memory_bytes() -> int | None:
    """Physical memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
