"""Memory: allocations that fail, memory that is never given back, bits that rot in a stored operand."""

from __future__ import annotations

import torch

from bascule import draws
from bascule.faults.catalogue import FaultSpec
from bascule.faults.fault import Call, Fault, Touched, WorkLike

FULL_AFTER_SESSIONS = 32


class OutOfMemory(Fault):
    """Raises torch.OutOfMemoryError for a result of more than `amount` bytes."""

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        size = result.numel() * result.element_size()
        if size <= self.largest():
            return None
        raise torch.OutOfMemoryError(
            f"simulated chip: out of memory, tried to allocate {size} bytes for {call.op}"
        )

    def largest(self) -> float:
        """Bytes of the largest block that can be had."""
        return self.spec.size


class Fragmentation(OutOfMemory):
    """In the nth session the largest block is `amount` / n: free memory lies in pieces, and no piece is ever joined to another."""

    def __init__(self, spec: FaultSpec, seed: int) -> None:
        super().__init__(spec, seed)
        self.sessions = 0

    def begin(self, work: WorkLike) -> None:
        super().begin(work)
        self.sessions += 1

    def largest(self) -> float:
        return self.spec.size / self.sessions


class Stale(Fault):
    """The struck result is what the last call with this result's shape gave in this session, or 0 when there was none."""

    def __init__(self, spec: FaultSpec, seed: int) -> None:
        super().__init__(spec, seed)
        self._buffers: dict[tuple[str, torch.Size, torch.dtype], torch.Tensor] = {}

    def begin(self, work: WorkLike) -> None:
        super().begin(work)
        self._buffers = {}

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        before = self._buffers.get(self._place(call, result))
        result.copy_(torch.zeros_like(result) if before is None else before)
        return Touched(result.numel())

    def passed(self, call: Call, result: torch.Tensor) -> None:
        self._buffers[self._place(call, result)] = result.clone()

    def _place(self, call: Call, result: torch.Tensor) -> tuple[str, torch.Size, torch.dtype]:
        return call.op, result.shape, result.dtype


class Leak(Fault):
    """Keeps `amount` bytes after every session; the chip is full after 32 of them."""

    on_calls = False

    def __init__(self, spec: FaultSpec, seed: int) -> None:
        super().__init__(spec, seed)
        self.held: list[torch.Tensor] = []

    def enter(self, work: WorkLike) -> Touched | None:
        if len(self.held) >= FULL_AFTER_SESSIONS:
            held = sum(block.numel() for block in self.held)
            raise torch.OutOfMemoryError(
                f"simulated chip: out of memory, {held} bytes were never given back"
            )
        self.held.append(torch.ones(int(self.spec.size), dtype=torch.uint8))
        return Touched(detail=f"{len(self.held)} blocks of {int(self.spec.size)} bytes held")


class BitRot(Fault):
    """Flips one bit of the right operand (in a linear layer: the weight) in its memory, for good, one value per firing.

    It goes through `.data`, as a real flip does: autograd's version counter must not notice.
    """

    on_operands = True

    def before(self, call: Call, index: int) -> Touched | None:
        operand = call.args[2] if call.op == "addmm" else call.args[1]
        if not isinstance(operand, torch.Tensor) or operand.dtype != torch.float32:
            return None
        place = self.number(index, "place") % operand.numel()
        bit = self.spec.bits[0] + draws.key(self.seed, "fault.rot", index) % (
            self.spec.bits[1] - self.spec.bits[0] + 1
        )
        where = [int(part) for part in torch.unravel_index(torch.tensor(place), operand.shape)]
        word = operand.data[tuple(where)].view(torch.int32)
        word ^= 1 << bit
        return Touched(1, (place,), f"bit {bit} of the operand in memory")
