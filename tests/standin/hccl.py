"""`hccl` for the stand-in: a process group over gloo that copies to the host and back. Installed beside the device by install.py.

PyTorch takes a back end written in Python when it derives from `dist.ProcessGroup`; the methods are those that DDP calls.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future


class Hccl(dist.ProcessGroup):
    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802 (PyTorch's name)
        return "hccl"

    @property
    def group_name(self) -> str:
        return str(dist.distributed_c10d._world.pg_names[self])

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        host = [tensor.cpu() for tensor in tensors]
        self._gloo.allreduce(host, opts or dist.AllreduceOptions()).wait()
        return _back(tensors, host)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        for tensor in tensors:
            self.allreduce([tensor])
        return _done(tensors)

    def broadcast(self, tensors: Any, opts: Any) -> Any:
        host = [tensor.cpu() for tensor in tensors]
        self._gloo.broadcast(host, opts).wait()
        return _back(tensors, host)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        host = [[tensor.cpu() for tensor in row] for row in outputs]
        self._gloo.allgather(host, [tensor.cpu() for tensor in inputs]).wait()
        return _back(sum(outputs, []), sum(host, []))

    def barrier(self, opts: Any = None) -> Any:
        self._gloo.barrier().wait()
        return _done([])


def register() -> None:
    dist.Backend.register_backend("hccl", lambda store, rank, size, timeout: Hccl(store, rank, size, timeout), devices=["npu"])  # fmt: skip


def _back(tensors: Any, host: Any) -> Any:
    for tensor, value in zip(tensors, host, strict=True):
        tensor.detach().copy_(value.view(tensor.shape))
    return _done(tensors)


def _done(tensors: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(tensors)
    return _create_work_from_future(future)
