"""The matrices of a larger model laid out once for the chip that decodes with it, instead of at every call.

On a CPU two kernels: the compiled product (cpp/products.h), for engines that serve and for int8; and oneDNN's blocked layout, which torch sees, up to twice as
fast as the plain one. For serving only (log-probabilities that are trained on stay fp32): bf16 reads half the bytes and multiplies in the
CPU's bf16 unit, and is refused without one, because it would be slower than fp32; int8 reads a quarter, one scale a row of the
matrix, activations stay fp32.

On any other device bf16 alone: half the bytes of each step, and the units that such chips are built of (an Ascend has none for fp32). Routed
experts are in it too. The fp32 weights stay beside it, so a model takes half as much again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bascule.errors import UsageError
from bascule.infer.compiled import Panels, compiled, why_not
from bascule.model.attention import LatentAttention
from bascule.model.experts import Experts
from bascule.model.transformer import Transformer

Precision = Literal["fp32", "bf16", "int8"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
LEAST_WEIGHTS = (
    1 << 17
)  # below it a call costs more than its arithmetic, and a plain call is the cheapest


class PanelLinear(nn.Module):
    """y = x @ weight^T + bias through the compiled product, the weight in fp32 or as int8 with a scale a row. The plain weight stays:
    other parts of the model read it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, plain: nn.Linear | PanelLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        weight = plain.weight.detach()
        codes, scale_N1 = quantised(weight) if dtype == torch.int8 else (weight, None)
        self.panels = Panels.of(codes, scale_N1, plain.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.panels.product(x)


class BlockedLinear(nn.Module):
    """y = x @ weight^T + bias through oneDNN, in and out in fp32. The plain weight stays, as above."""

    def __init__(self, plain: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias, self.dtype = plain.weight, plain.bias, dtype
        weight = plain.weight.detach().to(dtype)
        self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = None if plain.bias is None else plain.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype == torch.float32 and x.numel() == x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        blocked: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self._blocked, self._bias, "none", [], None
        )
        return blocked.float()


class HalfLinear(nn.Module):
    """y = x @ weight^T + bias in bf16 units, in and out in the type of x. The plain weight stays, as above."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self._half = plain.weight.detach().bfloat16()
        self._bias = None if plain.bias is None else plain.bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self._half, self._bias).to(x.dtype)


class HalfExperts(Experts):
    """Routed experts whose products and what lies between them are bf16, as in training (model/precision.py); in and out in the type of x."""

    def __init__(self, plain: Experts) -> None:
        nn.Module.__init__(self)
        self.per_token = plain.per_token
        halves = (one.detach().bfloat16() for one in (plain.gate_up_proj, plain.down_proj))
        self.gate_up_proj, self.down_proj = (nn.Parameter(one, requires_grad=False) for one in halves)  # fmt: skip

    def forward(self, sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
        return super().forward(sorted_MD.bfloat16(), counts_E).to(sorted_MD.dtype)


class RoundedLinear(nn.Module):
    """The numbers of a BlockedLinear in bf16 or a PanelLinear in int8 without their kernels."""

    def __init__(self, plain: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias, self.dtype = plain.bias, dtype
        weight = plain.weight.detach()
        if dtype == torch.int8:
            codes, scale_N1 = quantised(weight)
            weight = codes * scale_N1
        else:
            weight = weight.to(dtype).to(weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype == torch.int8:
            return F.linear(x, self.weight, self.bias)
        rounded = x.to(self.dtype).to(x.dtype)
        return F.linear(rounded, self.weight, self.bias).to(self.dtype).to(x.dtype)


def quantised(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and the scale of each row, (N, 1): the largest weight of a row becomes 127."""
    scale_N1 = (
        weight_NK.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    )
    return (weight_NK / scale_N1).round().to(torch.int8), scale_N1


def lay_out(model: Transformer, precision: Precision, *, native: bool = False) -> Transformer:
    """A model that shares everything with `model` but its large matrices; itself when it is not fp32, has none, or is asked for fp32 or int8
    on another chip. `native`: fp32 goes through the compiled product too, which torch does not see, so that no simulated fault could act on it.

    Raises UsageError for bf16 on a CPU that has no unit for it, and for int8 without a compiler.
    """
    weight = model.lm_head.weight
    if weight.dtype != torch.float32:
        return model
    if weight.device.type != "cpu":
        if precision != "bf16" or not any(_large(part) for part in model.modules()):
            return model
        return _with(model, HalfLinear, HalfExperts)
    if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        raise UsageError(
            "precision bf16 was asked for; this CPU has no bf16 unit (AVX512-BF16) and would be slower than in fp32. Use fp32."
        )
    if precision == "int8" and compiled() is None:
        raise UsageError(
            f"precision int8 was asked for; it needs a C++ compiler for this CPU's kernel, and {why_not()}. Install one, or use fp32."
        )
    panels = precision == "int8" or (precision == "fp32" and native and compiled() is not None)
    kind = PanelLinear if panels else BlockedLinear
    return _with(model, lambda plain: kind(plain, DTYPES[precision]))


def as_laid_out(model: Transformer, dtype: torch.dtype, *, experts: bool = False) -> Transformer:
    """What a model laid out in `dtype` computes, in operations that every chip has: to judge what such an engine said. `experts`: it ran on
    another chip than a CPU, where bf16 takes them in."""
    if model.lm_head.weight.dtype != torch.float32 or dtype == torch.float32:
        return model
    half = HalfExperts if experts and dtype == torch.bfloat16 else None
    return _with(model, lambda plain: RoundedLinear(plain, dtype), half)


def _with(
    model: Transformer,
    other: Callable[[nn.Linear], nn.Module],
    experts: Callable[[Experts], nn.Module] | None = None,
) -> Transformer:
    """The model with other large matrices; it shares everything else."""
    memo: dict[int, object] = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())
    }
    laid = copy.deepcopy(model, memo)  # the tree of modules; no tensor, they are in `memo`
    for parent in list(laid.modules()):
        for name, child in list(parent.named_children()):
            if not _large(child):
                continue
            absorbed = isinstance(parent, LatentAttention) and name == "kv_b_proj"
            if isinstance(child, nn.Linear) and not absorbed:
                setattr(parent, name, other(child))
            elif isinstance(child, Experts) and experts is not None:
                setattr(parent, name, experts(child))
    return laid


def _large(part: nn.Module) -> bool:
    matrix = getattr(part, "down_proj" if isinstance(part, Experts) else "weight", None)
    kind = isinstance(part, nn.Linear | Experts)
    return kind and isinstance(matrix, Tensor) and matrix.numel() >= LEAST_WEIGHTS
