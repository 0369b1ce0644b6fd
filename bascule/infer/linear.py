"""The matrices of a larger model laid out once for the CPU that decodes with it, instead of at every call.

In fp32 oneDNN's blocked layout is up to twice as fast from two rows up; one row is as fast with the plain kernel, which it keeps.
In bf16 (for serving only: log-probabilities that are trained on stay fp32) half the bytes are read and products are made by the
CPU's bf16 unit; without one bf16 is slower than fp32, so it is refused. int8 was tried and left out: docs/log.md has the figures.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bascule.errors import UsageError
from bascule.model.attention import LatentAttention
from bascule.model.transformer import Transformer

Precision = Literal["fp32", "bf16"]
LEAST_WEIGHTS = (
    1 << 17
)  # below it a call costs more than its arithmetic, and a plain call is the cheapest


class BlockedLinear(nn.Module):
    """y = x @ weight^T + bias, in and out in fp32. The plain weight stays: other parts of the model read it."""

    def __init__(self, plain: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias, self.dtype = plain.weight, plain.bias, dtype
        weight = plain.weight.detach().to(dtype)
        self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = None if plain.bias is None else plain.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype == torch.float32 and x.numel() == x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        done: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self._blocked, self._bias, "none", [], None
        )
        return done.float()


def lay_out(model: Transformer, precision: Precision) -> Transformer:
    """A model that shares everything with `model` but its large matrices; itself when it is not fp32 on a CPU.

    Raises UsageError for bf16 on a CPU that has no unit for it.
    """
    weight = model.lm_head.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return model
    if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        raise UsageError(
            "precision bf16 was asked for; this CPU has no bf16 unit (AVX512-BF16) and would be slower than in fp32. Use fp32."
        )
    memo: dict[int, object] = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())
    }
    laid = copy.deepcopy(model, memo)  # the tree of modules; no tensor, they are in `memo`
    for parent in list(laid.modules()):
        for name, child in list(parent.named_children()):
            absorbed = isinstance(parent, LatentAttention) and name == "kv_b_proj"
            if isinstance(child, nn.Linear) and child.weight.numel() >= LEAST_WEIGHTS and not absorbed:  # fmt: skip
                dtype = torch.float32 if precision == "fp32" else torch.bfloat16
                setattr(parent, name, BlockedLinear(child, dtype))
    return laid
