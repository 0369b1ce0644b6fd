"""The CPU: always there, the referee of last resort, and the base of simulated chips in tests."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from bascule.accelerators.base import Accelerator, ChipInfo, MemoryUse

PROCESS_STATUS = Path("/proc/self/status")
PROCESS_CLEAR = Path("/proc/self/clear_refs")


class CpuAccelerator(Accelerator):
    """Allocated memory is what the C library has handed out (glibc tells), else the process's resident set; the peak is of the
    resident set. Linux tells them, other systems do not.

    The resident set alone wobbles by megabytes without a leak: freed pages stay, idle ones are swapped out and come back.
    """

    collective_backend = "gloo"

    def __init__(self, name: str = "cpu") -> None:
        self.name = name
        self.device = torch.device("cpu")

    def info(self) -> ChipInfo:
        return ChipInfo(
            vendor=platform.machine(),
            name=_model_name(),
            driver=f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
            memory_bytes=_total_bytes(),
            simulated=False,
            base=None,
        )

    def prepare(self, threads: int) -> None:
        super().prepare(threads)
        _keep_freed_pages()

    def synchronize(self) -> None:
        """Nothing to wait for: CPU kernels have finished when they return."""

    def memory(self) -> MemoryUse:
        allocated = _handed_out() if _told_by_glibc() else _status_bytes("VmRSS")
        return MemoryUse(allocated, _status_bytes("VmHWM"), _total_bytes())

    def reset_peak_memory(self) -> None:
        """Ask Linux to restart VmHWM at the present size; where it refuses, the peak stays that of the process's life."""
        try:
            PROCESS_CLEAR.write_text("5")
        except OSError:
            return

    def empty_cache(self) -> None:
        """Give what the C library keeps for later back to the system, where it can (glibc). Otherwise, where only the resident set is
        known, a leak hides in memory that was freed before: the set does not grow while it is filled again."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33: `uordblks` bytes in use in heaps, `hblkhd` in blocks mapped one by one."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


_TRIM, _MAP = -1, -3  # mallopt's numbers
KEPT_BYTES = 2**28


def _keep_freed_pages() -> None:
    """Ask the C library (glibc) to keep what a step frees for the next one. As it comes it hands blocks of some megabytes back to
    the system and has every page cleared again: 2,000 page faults, a twentieth of a step of `nano`."""
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is not None:
        tell(_MAP, 2**25)  # glibc's own upper bound
        tell(_TRIM, KEPT_BYTES)


@functools.cache
def _mallinfo() -> Callable[[], _MallocInfo]:
    tell = ctypes.CDLL(None).mallinfo2
    tell.restype = _MallocInfo
    return tell


def _handed_out() -> int:
    info = _mallinfo()()
    return int(info.uordblks + info.hblkhd)


@functools.cache
def _told_by_glibc() -> bool:
    """Not where another allocator was put in glibc's place: then a new tensor does not show."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        return False
    before = _handed_out()
    held = torch.empty(2**20, dtype=torch.uint8)
    return _handed_out() - before >= held.nbytes


def _status_bytes(field: str) -> int | None:
    if not PROCESS_STATUS.exists():
        return None
    for line in PROCESS_STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _total_bytes() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _model_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
