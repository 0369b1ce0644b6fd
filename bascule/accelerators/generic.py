"""What PyTorch offers in common for every accelerator (`torch.accelerator`); a vendor file adds only what is not common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import torch

from bascule.accelerators.base import Accelerator, MemoryUse, Recorder, Role


class GenericAccelerator(Accelerator):
    """A device that `torch.accelerator` can drive: cuda, npu, and any private-use device that fills in PyTorch's hooks."""

    graphs: ClassVar[str] = ""
    """The graph class in the device's own torch module. Those are older than `torch.accelerator.Graph` (torch 2.12), and CUDA had not
    filled that in when this was written (pytorch pull request 171313)."""

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
        """The back end's own graphs, else `torch.accelerator.Graph`; whether they work shows when they are asked to record."""
        return self._record if self._own_graph() or hasattr(torch.accelerator, "Graph") else None

    def _own_graph(self) -> Any:
        return getattr(torch.get_device_module(self.device), self.graphs, None) if self.graphs else None  # fmt: skip

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """First once unrecorded, aside: libraries set themselves up at their first call, which no recording may hold. By hand, not by the
        back ends' context managers: where a recording fails, those leave their stream behind as the current one."""
        stream = torch.Stream(self.device)
        stream.wait_stream(torch.accelerator.current_stream(self.device))
        with stream:
            run()
        self.synchronize()
        self.empty_cache()
        graph, begin = self._graph()
        with stream:
            begin()
            try:
                run()
            except BaseException:
                with suppress(
                    RuntimeError
                ):  # of the broken recording, after the error that broke it
                    graph.capture_end()
                raise
            graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay

    def _graph(self) -> tuple[Any, Callable[[], None]]:
        """(graph, what begins its recording). Other threads, which write snapshots, may go on meanwhile."""
        if own := self._own_graph():
            graph = own()
            return graph, lambda: graph.capture_begin(capture_error_mode="thread_local")
        graph = torch.accelerator.Graph(capture_error_mode="thread_local")
        return graph, graph.capture_begin


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
