"""Collectives: the sum that an all-reduce brings back is not the sum of the parts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bascule.faults.fault import Call, Fault, Touched


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class WrongSum(Fault):
    """Some values lack one rank's part: modelled as (n-1)/n of the sum, or 0 on one rank, at periodic positions."""

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        where = torch.arange(0, result.numel(), self.spec.stride, device=result.device)
        flat = result.view(-1)
        flat[where] = flat[where] * ((ranks() - 1) / ranks())
        return Touched(where.numel(), tuple(where[:8].tolist()))


class DoubleSum(Fault):
    """The result is summed over the ranks once more, so it is n times what it should be (twice on one rank)."""

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        result.mul_(max(2, ranks()))
        return Touched(result.numel())


class LostTail(Fault):
    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        tail = min(int(self.spec.size), result.numel())
        result.view(-1)[-tail:] = 0
        return Touched(tail)
