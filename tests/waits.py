"""Operators of a block that would make the host wait for a GPU: it must know a value, or how many there are, before it can go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bascule.dispatch import OperatorMode

ALWAYS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal", "is_nonzero",
}  # fmt: skip


class Waits(OperatorMode):
    """`seen`: how often each such operator ran on tensors of device `on`. On the CPU reading a tensor (`tolist`, `cpu`) is no operator; on
    another device it is a `copy to the host`."""

    def __init__(self, on: str = "cpu") -> None:
        super().__init__()
        self.on = on
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        done = func(*args, **(kwargs or {}))
        if self.on in {one.device.type for one in _tensors(args)}:
            word = self._wait(func.overloadpacket.__name__, func._overloadname, args, done)
            self.seen.update([word] if word else [])
        return done

    def _wait(self, name: str, overload: str, args: Any, done: Any) -> str:
        if name in ALWAYS or (name == "repeat_interleave" and overload == "Tensor"):
            return name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            asked = [one for one in args[1] if one is not None]
            return f"{name} by a mask" if any(one.dtype is torch.bool for one in asked) else ""
        if name in ("_to_copy", "copy_", "_copy_from"):
            return "copy to the host" if done.device.type == "cpu" != self.on else ""
        return ""


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
