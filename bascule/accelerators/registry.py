"""From a name to an opened accelerator. The table below is the list; simulated chips open only when they are named.

cpu | cuda | cuda:1 | npu | npu:0 | sim:PROFILE[:SEVERITY][?KNOB=VALUE&...][@BASE]       BASE is any of these but sim, default cpu
A|B|...                                                                       the first of them that opens
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bascule.accelerators.base import Accelerator
from bascule.accelerators.cpu import CpuAccelerator
from bascule.accelerators.cuda import open_cuda
from bascule.accelerators.names import check_choices, parse_simulated
from bascule.accelerators.npu import open_npu
from bascule.accelerators.simulated import SimulatedAccelerator
from bascule.errors import AcceleratorUnavailable
from bascule.faults.catalogue import open_profile

REAL: dict[str, Callable[[str], Accelerator]] = {
    "cpu": CpuAccelerator,
    "cuda": open_cuda,
    "npu": open_npu,
}


def open_accelerator(name: str, *, seed: int = 0, fault_log: Path | None = None) -> Accelerator:
    """Open `name`; of `a|b` the first that opens, with `fallback_note` saying what was skipped and why.

    `seed` and `fault_log` matter to simulated chips only. Raises AcceleratorUnavailable when nothing opens, RecipeError when a
    name makes no sense (a misspelt name is never skipped over).
    """
    skipped: list[str] = []
    for choice in check_choices(name):
        try:
            accelerator = _open_one(choice, seed, fault_log)
        except AcceleratorUnavailable as error:
            skipped.append(str(error))
            continue
        if skipped:
            accelerator.fallback_note = f"'{name}' opened as '{choice}': {' '.join(skipped)}"
        return accelerator
    raise AcceleratorUnavailable(" ".join(skipped))


def _open_one(name: str, seed: int, fault_log: Path | None) -> Accelerator:
    if not name.startswith("sim:"):
        return REAL[name.partition(":")[0]](name)
    plant, base = parse_simulated(name)
    opened = REAL[base.partition(":")[0]](base)
    return SimulatedAccelerator(name, opened, open_profile(plant), seed=seed, fault_log=fault_log)
