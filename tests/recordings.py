"""What a chip's recordings do, for devices that have none: operators are noted once and later run again on the very same tensors.

As with a CUDA graph, a value that the host knew while recording is fixed for ever, what is read from tensors is read anew, and every
result lies where it lay when it was recorded. An operator that makes the host wait cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.waits import Waits


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        done = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, done))
        return done


class Graph:
    """As a back end's graph class (torch.cuda.CUDAGraph and its like), for tensors on `device`; `played` counts."""

    def __init__(self, device: str) -> None:
        self.played = 0
        self._noting, self._waits = _Noting(), Waits(device)
        self._modes = ExitStack()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._modes.enter_context(self._noting)
        self._modes.enter_context(self._waits)

    def capture_end(self) -> None:
        self._modes.close()
        if self._waits.seen:
            raise RuntimeError(f"operation not permitted while recording: {dict(self._waits.seen)}")

    @torch.no_grad()  # a chip plays kernels, of which autograd knows nothing
    def replay(self) -> None:
        self.played += 1
        for func, args, kwargs, kept in self._noting.calls:
            again = func(*args, **kwargs)
            for place, value in zip(_tensors(kept), _tensors(again), strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.detach().copy_(value)


class Recordings:
    """An Accelerator.recorder for tensors on `device`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.graphs: list[Graph] = []

    @property
    def played(self) -> int:
        return sum(graph.played for graph in self.graphs)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = Graph(self.device)
        self.graphs.append(graph)
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
        return graph.replay


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for one in value if isinstance(one, Tensor)] if isinstance(value, tuple | list) else []  # fmt: skip
