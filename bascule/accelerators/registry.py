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
from bascule.accelerators.npu import open_npu
from bascule.accelerators.simulated import SimulatedAccelerator
from bascule.errors import AcceleratorUnavailable, RecipeError, nearest
from bascule.faults.catalogue import open_profile, profiles

REAL: dict[str, Callable[[str], Accelerator]] = {
    "cpu": CpuAccelerator,
    "cuda": open_cuda,
    "npu": open_npu,
}


def known() -> list[str]:
    """Every name without device numbers, severities and knobs."""
    return [*REAL, *(f"sim:{profile}" for profile in profiles())]


def open_accelerator(name: str, *, seed: int = 0, fault_log: Path | None = None) -> Accelerator:
    """Open `name`; of `a|b` the first that opens, with `fallback_note` saying what was skipped and why.

    `seed` and `fault_log` matter to simulated chips only. Raises AcceleratorUnavailable when nothing opens, RecipeError when a
    name makes no sense (a misspelt name is never skipped over).
    """
    skipped: list[str] = []
    choices = [choice.strip() for choice in name.split("|")]
    for choice in choices:
        check_name(choice)
    for choice in choices:
        try:
            accelerator = _open_one(choice, seed, fault_log)
        except AcceleratorUnavailable as error:
            skipped.append(str(error))
            continue
        if skipped:
            accelerator.fallback_note = f"'{name}' opened as '{choice}': {' '.join(skipped)}"
        return accelerator
    raise AcceleratorUnavailable(" ".join(skipped))


def check_name(name: str) -> None:
    """Raise RecipeError unless `name` (one choice, no `|`) could be opened on some machine."""
    kind, colon, rest = name.partition(":")
    if kind == "sim" and colon:
        plant, base = parse_simulated(name)
        open_profile(plant)
        if base.partition(":")[0] == "sim":
            raise RecipeError(
                f"'{name}': a simulated chip cannot be the base of another. Use one of {', '.join(REAL)} after '@'."
            )
        check_name(base)
    elif kind not in REAL or (colon and not rest.isdigit()) or (colon and kind == "cpu"):
        raise RecipeError(
            f"'{name}' is not an accelerator; allowed: cpu, cuda, cuda:N, npu, npu:N, sim:PROFILE[@BASE].{nearest(name, known())}"
        )


def parse_simulated(name: str) -> tuple[str, str]:
    """`sim:ascend-r2:high?onset_step=40@cpu` -> ('ascend-r2:high?onset_step=40', 'cpu')."""
    plant, _, base = name.removeprefix("sim:").partition("@")
    return plant, base or "cpu"


def _open_one(name: str, seed: int, fault_log: Path | None) -> Accelerator:
    if not name.startswith("sim:"):
        return REAL[name.partition(":")[0]](name)
    plant, base = parse_simulated(name)
    opened = REAL[base.partition(":")[0]](base)
    return SimulatedAccelerator(name, opened, open_profile(plant), seed=seed, fault_log=fault_log)
