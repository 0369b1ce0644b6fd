"""`hccl` for the stand-in: a process group over gloo that copies to the host and back.

PyTorch takes a back end written in Python when it derives from `dist.ProcessGroup`; the methods are those that DDP, FSDP2 and
torch.distributed.checkpoint call. Averages, which gloo lacks, are sums divided here.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future


class Hccl(dist.ProcessGroup):
    """`planted`: names of collectives (`allreduce`, `reduce_scatter`, ...) that lose the value in the middle of each result."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta, planted: set[str]
    ) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._planted = planted

    def getBackendName(self) -> str:  # noqa: N802 (PyTorch's name)
        return "hccl"

    @property
    def group_name(self) -> str:
        return str(dist.distributed_c10d._world.pg_names[self])

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        host = [tensor.cpu() for tensor in tensors]
        self._sum(host, opts or dist.AllreduceOptions())
        return self._back("allreduce", tensors, host)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        for tensor in tensors:
            self.allreduce([tensor], opts)
        return _done(tensors)

    def broadcast(self, tensors: Any, opts: Any) -> Any:
        host = [tensor.cpu() for tensor in tensors]
        self._gloo.broadcast(host, opts).wait()
        return self._back("broadcast", tensors, host)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        host = [[tensor.cpu() for tensor in row] for row in outputs]
        self._gloo.allgather(host, [tensor.cpu() for tensor in inputs]).wait()
        return self._back("allgather", sum(outputs, []), sum(host, []))

    def all_gather_single(self, output: Any, given: Any, opts: Any = None) -> Any:
        return self.allgather([list(output.view(-1).chunk(self.size()))], [given.reshape(-1)])

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for output, given in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, given)
        return _done(outputs)

    def reduce_scatter_single(self, output: Any, given: Any, opts: Any = None) -> Any:
        """Everybody adds up everything and keeps its part."""
        host = given.cpu()
        self._sum([host], opts or dist.ReduceScatterOptions())
        return self._back("reduce_scatter", [output], [host.view(-1).chunk(self.size())[self.rank()]])  # fmt: skip

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        host = [[tensor.cpu() for tensor in row] for row in outputs]
        self._gloo.gather(host, [tensor.cpu() for tensor in inputs], opts).wait()
        return self._back("gather", sum(outputs, []), sum(host, []))

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        host = [tensor.cpu() for tensor in outputs]
        self._gloo.scatter(host, [[tensor.cpu() for tensor in row] for row in inputs], opts).wait()
        return self._back("scatter", outputs, host)

    def barrier(self, opts: Any = None) -> Any:
        self._gloo.barrier().wait()
        return _done([])

    # The names until torch 2.12.
    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def _sum(self, host: list[torch.Tensor], opts: Any) -> None:
        average = opts.reduceOp == dist.ReduceOp.AVG
        adding = dist.AllreduceOptions()
        adding.reduceOp = dist.ReduceOp.SUM if average else opts.reduceOp
        self._gloo.allreduce(host, adding).wait()
        if average:
            torch._foreach_div_(host, self.size())

    def _back(self, name: str, tensors: Any, host: Any) -> Any:
        for tensor, value in zip(tensors, host, strict=True):
            if name in self._planted and value.numel():
                value.view(-1)[value.numel() // 2] = 0
            tensor.detach().copy_(value.view(tensor.shape))
        return _done(tensors)


def register(planted: set[str]) -> None:
    dist.Backend.register_backend("hccl", lambda store, rank, size, timeout: Hccl(store, rank, size, timeout, planted), devices=["npu"])  # fmt: skip


def _done(tensors: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(tensors)
    return _create_work_from_future(future)
