"""Time: sessions that take longer, calls that never return, operators that run on the host."""

from __future__ import annotations

import time
import warnings

import torch

from bascule.faults.catalogue import FaultSpec
from bascule.faults.fault import Call, Fault, Touched, WorkLike

FOR_EVER_S = 10 * 365 * 24 * 3600.0


class Slow(Fault):
    """The session takes `amount` times as long; with `ramp_steps` the slowness grows, as a chip that heats up or ages."""

    on_calls = False

    def drag(self, work: WorkLike, seconds: float) -> Touched | None:
        extra = (self.spec.size - 1.0) * seconds * self._rate(work.step)
        if extra <= 0:
            return None
        time.sleep(extra)
        return Touched(detail=f"{extra:.4f} s lost")


class Hang(Fault):
    """The first struck call sleeps `amount` seconds, or for ever. The process answers signals, which a real hang may not."""

    on_operands = True
    fatal = True

    def before(self, call: Call, index: int) -> Touched | None:
        time.sleep(self.spec.size or FOR_EVER_S)
        return Touched(detail=f"hung {self.spec.size} s")


class CompileStall(Fault):
    """Shapes are forgotten when the process ends, as a compiler's cache in memory is."""

    on_operands = True

    def __init__(self, spec: FaultSpec, seed: int) -> None:
        super().__init__(spec, seed)
        self._compiled: set[tuple[object, ...]] = set()

    def before(self, call: Call, index: int) -> Touched | None:
        shapes = tuple(value.shape for value in call.args if isinstance(value, torch.Tensor))
        if (call.op, *shapes) in self._compiled:
            return None
        self._compiled.add((call.op, *shapes))
        time.sleep(self.spec.size)
        return Touched(detail=f"{self.spec.size} s lost compiling {call.op}")


class HostFallback(Fault):
    on_operands = True

    def before(self, call: Call, index: int) -> Touched | None:
        warnings.warn(
            f"simulated chip: the operator {call.name} is not supported and falls back to run on the CPU",
            UserWarning,
            stacklevel=2,
        )
        time.sleep(self.spec.size)
        return Touched(detail=f"{self.spec.size} s lost on the host")
