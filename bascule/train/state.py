"""Where a run stands, and under which circumstances its numbers were made."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from bascule.model import kernels

StateDict = dict[str, Any]
"""State by name: each value is a tensor or a JSON value. Tensors travel as safetensors, the rest as JSON; no pickle."""


@dataclass(frozen=True)
class TrainState:
    """`step` counts committed steps over all phases; `phase` is that of the last committed step ("" before the first)."""

    step: int = 0
    phase: str = ""
    recipe_sha256: str = ""


@dataclass(frozen=True)
class Circumstances:
    """What must be equal, besides the snapshot, for two runs to be equal bit for bit on one machine."""

    bascule: str
    torch: str
    python: str
    threads: int
    cpu: str
    kernels: str

    @classmethod
    def now(cls) -> Circumstances:
        return cls(
            bascule=version("bascule"),
            torch=torch.__version__,
            python=platform.python_version(),
            threads=torch.get_num_threads(),
            cpu=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            kernels="compiled" if kernels.compiled() else "PyTorch's",
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def differences(then: dict[str, Any], now: Circumstances) -> list[str]:
    """One sentence for everything that differs from the circumstances a snapshot was saved under."""
    present = now.to_json()
    return [
        f"the snapshot was saved with {name} {then.get(name, 'unknown')}, this process has {value}: the run goes on, "
        "but its numbers need not be bit-equal to an undisturbed run's"
        for name, value in present.items()
        if then.get(name) != value
    ]
