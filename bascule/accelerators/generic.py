"""What PyTorch offers in common for every accelerator (`torch.accelerator`); a vendor file adds only what is not common."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bascule.accelerators.base import Accelerator, MemoryUse, Recorder, Role


class GenericAccelerator(Accelerator):
    """A device that `torch.accelerator` can drive: cuda, npu, and any private-use device that fills in PyTorch's hooks."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self.device)

    def memory(self) -> MemoryUse:
        return MemoryUse(
            torch.accelerator.memory_allocated(self.device),
            torch.accelerator.max_memory_allocated(self.device),
            self.total_bytes(),
        )

    def total_bytes(self) -> int | None:
        _free, total = torch.accelerator.get_memory_info(self.device)
        return int(total)

    def free_bytes(self) -> int | None:
        free, _total = torch.accelerator.get_memory_info(self.device)
        return int(free)

    def reset_peak_memory(self) -> None:
        torch.accelerator.reset_peak_memory_stats(self.device)

    def empty_cache(self) -> None:
        torch.accelerator.empty_cache()

    def recorder(self, role: Role) -> Recorder | None:
        """`torch.accelerator.Graph`, where this PyTorch has it; whether the back end does shows when it is asked to record."""
        return self._record if hasattr(torch.accelerator, "Graph") else None

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """First once unrecorded, aside: libraries set themselves up at their first call, which no recording may hold."""
        stream = torch.Stream(self.device)
        stream.wait_stream(torch.accelerator.current_stream(self.device))
        with stream:
            run()
        self.synchronize()
        graph = torch.accelerator.Graph()
        with stream, graph:
            run()
        return graph.replay


def device_index(name: str, count: int) -> int:
    """The index in `cuda:1`, 0 when none is given.

    Raises ValueError, worded for people, when it is not a number or there are not so many devices.
    """
    kind, _, text = name.partition(":")
    index = text or "0"
    if not index.isdigit():
        raise ValueError(f"'{text}' is not a device number; write {kind}:0")
    if int(index) >= count:
        raise ValueError(
            f"there {'is' if count == 1 else 'are'} {count} {kind} device{'' if count == 1 else 's'} here, counted from 0"
        )
    return int(index)
