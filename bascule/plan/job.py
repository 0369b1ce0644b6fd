"""What is to be run: a model on so many chips, in a layout, with a batch, a precision and a software stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bascule.plan.architecture import Shape
from bascule.plan.catalogue import Chip

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How chips share the work. `zero`: optimizer states (1), gradients too (2), weights too (3) split over data parallel.

    `dp` counts replicas of a pipeline: chips = tp * pp * cp * dp; experts are split over `ep` of those chips.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    zero: int = 1
    micro_batch: int = 1
    recompute: Recompute = "none"
    tp_overlap: bool = False
    schedule: str = "1f1b"

    def words(self) -> str:
        parts = [
            f"TP{self.tp}",
            f"PP{self.pp}",
            f"EP{self.ep}",
            f"CP{self.cp}",
            f"DP{self.dp}",
            f"micro-batch {self.micro_batch}",
        ]
        extra = [f"{self.vpp} virtual stages"] if self.vpp > 1 else []
        return ", ".join(
            [*parts, *extra, f"ZeRO-{self.zero}", f"recompute {self.recompute}", self.schedule]
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run. `software` is the stack's name, `software_date` its age as a year with fraction (2025.75)."""

    shape: Shape
    chip: Chip
    chips: int
    sequence: int
    global_batch: int
    precision: str
    layout: Layout
    software: str = "unknown"
    software_date: float | None = None
    balanced: bool = False

    @property
    def tokens_per_step(self) -> float:
        return float(self.global_batch) * self.sequence

    @property
    def micro_batches(self) -> int:
        """Micro-batches one pipeline works through in a step, at least one."""
        local = max(1.0, self.global_batch / self.layout.dp)
        count = max(1, round(local / self.layout.micro_batch))
        if (
            self.layout.pp > 1 and count < self.layout.pp
        ):  # the whole local batch was given: a pipeline splits it itself
            count = int(min(local, self.layout.pp))
        return max(1, count)

    @property
    def micro_tokens(self) -> float:
        """Tokens of one micro-batch on one chip, after context parallelism has cut the sequence."""
        return self.tokens_per_step / self.layout.dp / self.micro_batches / self.layout.cp


def precision_class(text: str) -> str:
    """`bf16`, `fp8`, `fp4` or `int8` for a paper's own words. Mixed recipes count as their matrix products' width."""
    word = text.upper()
    if "FP4" in word:
        return "fp4"
    if "FP8" in word:
        return "fp8"
    if "INT8" in word or "W8A8" in word or "A8W8" in word:
        return "int8"
    return "bf16"
