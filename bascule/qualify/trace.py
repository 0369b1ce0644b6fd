"""Every operator a block of code calls, with the tensors it was called on: recorded once, played again on any device.

The recorder sits below autograd, so it sees forward, backward and optimizer alike, with real shapes, strides, types and values.
A call is kept once per signature and counted. Playing it again on the chip asks for exactly what the model will ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from bascule.dispatch import OperatorMode

# Fused attention is chosen per device below autograd. Its CPU form would be "missing" everywhere else, so the call is kept as
# the device-neutral operator, which lets every chip choose its own kernel. The backward form goes: autograd finds it again.
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_UNDEFINED_VALUES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_RANDOM = ("bernoulli", "normal", "uniform", "rand", "randn", "randint", "randperm", "multinomial", "dropout")  # fmt: skip


@dataclass
class Call:
    """One operator with the arguments of its first occurrence, kept on the CPU. `count`: occurrences in the trace."""

    phase: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    signature: str
    count: int = 1

    @property
    def name(self) -> str:
        """`aten::mm`, the operator without its overload."""
        return str(self.op._schema.name)

    @property
    def base_name(self) -> str:
        return self.name.rpartition("::")[2]

    @property
    def is_view(self) -> bool:
        return bool(self.op.is_view)

    @property
    def mutates(self) -> bool:
        return bool(self.op._schema.is_mutable)

    @property
    def has_defined_value(self) -> bool:
        """Can two devices be asked for the same answer? Not of uninitialised memory, not of random numbers."""
        bare = self.base_name.rstrip("_")
        return bare not in _UNDEFINED_VALUES and bare not in _RANDOM

    def tensors(self) -> list[Tensor]:
        return [
            leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)
        ]

    def cast(self, dtype: torch.dtype) -> Call:
        """The same call with its fp32 tensors, and fp32 where it is named, as `dtype`."""

        def change(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                return transplant(leaf, torch.device("cpu"), dtype)
            return dtype if leaf is torch.float32 else leaf

        args, kwargs = tree_map(change, (self.args, self.kwargs))
        short = str(dtype).removeprefix("torch.")
        return replace(self, args=args, kwargs=kwargs, signature=f"{short}: {self.signature}")

    def run(
        self, device: torch.device, *, dtype: torch.dtype | None = None, moved: Moved | None = None
    ) -> list[Tensor]:
        """Play the call on `device`; float tensors are first cast to `dtype` if one is given. Returns the tensors it returns and,
        if it writes in place, the arguments after it. `moved` (from `place`) avoids copying twice."""
        args, kwargs = moved or self.place(device, dtype)
        out = self.op(*args, **kwargs)
        results = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        if self.mutates:
            results += [
                leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)
            ]
        return results

    def place(
        self,
        device: torch.device,
        dtype: torch.dtype | None = None,
        change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Moved:
        """Copies of the arguments on `device`, strides kept. `change` is applied to float tensors on the CPU first."""

        def move(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                source = change(leaf) if leaf.is_floating_point() else leaf
                return transplant(source, device, dtype if leaf.is_floating_point() else None)
            if isinstance(leaf, torch.device):
                return device
            if (
                isinstance(leaf, torch.dtype)
                and dtype is not None
                and leaf in (torch.float32, torch.bfloat16, torch.float16)
            ):
                return dtype
            return leaf

        args, kwargs = tree_map(move, (self.args, self.kwargs))
        return args, kwargs


Moved = tuple[tuple[Any, ...], dict[str, Any]]


def transplant(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on `device` with the same size, strides and overlaps (an expanded tensor stays expanded)."""
    tensor = tensor.detach()
    if tensor.numel() == 0 or tensor.is_sparse:
        return tensor.to(device, dtype or tensor.dtype, copy=True)
    span = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    memory = torch.as_strided(tensor, (span,), (1,), tensor.storage_offset())
    copied = memory.to(device, dtype or tensor.dtype, copy=True)
    return torch.as_strided(copied, tensor.shape, tensor.stride(), 0)


@dataclass
class Trace:
    """Calls by (phase, signature), in the order of first occurrence."""

    calls: dict[tuple[str, str], Call] = field(default_factory=dict)

    def of(self, *phases: str) -> list[Call]:
        return [call for call in self.calls.values() if call.phase in phases]

    @contextmanager
    def recording(self, phase: str) -> Iterator[None]:
        """Record what is called inside as `phase`; autograd's own thread on the CPU is this one, so backward is seen too."""
        with _Recorder(self, phase):
            yield


class _Recorder(OperatorMode):
    def __init__(self, trace: Trace, phase: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.phase = phase

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bare = func._schema.name.rpartition("::")[2]
        if bare == _ATTENTION + "_backward":
            return
        if bare == _ATTENTION:
            func, args, kwargs = _neutral_attention(args, kwargs)
        signature = signature_of(func, args, kwargs)
        known = self.trace.calls.get((self.phase, signature))
        if known:
            known.count += 1
            return
        kept_args, kept_kwargs = tree_map(_keep, (args, kwargs))
        self.trace.calls[self.phase, signature] = Call(
            self.phase, func, kept_args, kept_kwargs, signature
        )


def _neutral_attention(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(q, k, v, dropout_p, is_causal; attn_mask, scale) to the order of aten::scaled_dot_product_attention."""
    q, k, v, *rest = args
    dropout = rest[0] if rest else 0.0
    causal = rest[1] if len(rest) > 1 else False
    neutral = (q, k, v, kwargs.get("attn_mask"), dropout, causal)
    return (
        torch.ops.aten.scaled_dot_product_attention.default,
        neutral,
        {"scale": kwargs.get("scale")},
    )


def _keep(leaf: Any) -> Any:
    return transplant(leaf, torch.device("cpu")) if isinstance(leaf, Tensor) else leaf


def signature_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Operator, shapes, strides, types and plain arguments: what decides which kernel runs."""
    words = []
    for leaf in tree_flatten((args, kwargs))[0]:
        if isinstance(leaf, Tensor):
            kind = str(leaf.dtype).removeprefix("torch.")
            stride = "" if leaf.is_contiguous() else f"/{'.'.join(map(str, leaf.stride()))}"
            words.append(f"{kind}[{'x'.join(map(str, leaf.shape))}]{stride}")
        else:
            words.append(str(leaf))
    return f"{func}({', '.join(words)})"
