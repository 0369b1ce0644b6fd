"""The small parts every decoder block is made of: RMS norm, rotary tables, the SwiGLU feed-forward.

Letters in names: B batch rows, T tokens of this call, D hidden size, F feed-forward size, P positions, R rotary width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bascule.config.model import RopeScaling
from bascule.model import fused, kernels, rope
from bascule.model.precision import narrow


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain (Zhang & Sennrich 2019). Statistics are taken in fp32 by the kernel."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if kernels.usable(x, self.weight):
            return fused.rms_norm(x, self.weight, self.eps)
        # Under bf16 products x may be narrower than the gain; no fused kernel takes two types.
        wide = x.to(self.weight.dtype)
        return F.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)

    def after_adding(self, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """(x + more, its norm): a residual stream and what the next part reads of it."""
        if kernels.usable(x, more, self.weight):
            return fused.add_rms_norm(x, more, self.weight, self.eps)
        x = x + more
        return x, self(x)


class Rotary(nn.Module):
    """Tables for rotary position embedding, fp32, one row per position.

    `pairing` says which two numbers turn together: "neighbours" (x0,x1),(x2,x3).. is what DeepSeek's weights are trained
    for (`rope_interleave: true`); "halves" (x0,x[R/2]).. is Llama's and Qwen's. Both are `x*cos + swap(x)*sin` once the
    signs sit in the sine table, so a rotation costs four operations.
    """

    cos_PR: Tensor
    sin_PR: Tensor

    def __init__(
        self,
        size: int,
        positions: int,
        theta: float,
        pairing: Literal["neighbours", "halves"],
        scaling: RopeScaling | None = None,
    ) -> None:
        super().__init__()
        self.size, self.positions, self.theta, self.pairing = size, positions, theta, pairing
        self.scaling = scaling
        cos, sin = self._tables()
        self.register_buffer("cos_PR", cos, persistent=False)
        self.register_buffer("sin_PR", sin, persistent=False)

    def _tables(self) -> tuple[Tensor, Tensor]:
        frequency = rope.frequencies(self.size, self.theta, self.scaling)
        angle = torch.outer(torch.arange(self.positions).float(), frequency)
        cos, sin = angle.cos(), angle.sin()
        if self.scaling is not None:
            gain = rope.table_gain(self.scaling)
            cos, sin = cos * gain, sin * gain
        if self.pairing == "halves":
            return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Rotary:
        """Move with the model but stay fp32: in bf16 neighbouring positions above 256 become equal."""
        cos, sin = self.cos_PR, self.sin_PR
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.cos_PR = _same_dtype(self.cos_PR, cos)
        self.sin_PR = _same_dtype(self.sin_PR, sin)
        return self

    def forward(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of shape [B, T, 1, R]; the 1 stands for heads."""
        return self.cos_PR[positions_BT].unsqueeze(2), self.sin_PR[positions_BT].unsqueeze(2)

    def prefix(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions 0..length-1, shape [1, length, 1, R], without a gather."""
        return self.cos_PR[None, :length, None], self.sin_PR[None, :length, None]


def _same_dtype(moved: Tensor, before: Tensor) -> Tensor:
    """`before` on the device of `moved`, for buffers that a `.to(bfloat16)` must not round."""
    return moved if moved.dtype == before.dtype else before.to(moved.device)


def rotate_neighbours(x_BTHR: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    if kernels.usable(x_BTHR, cos_BT1R):
        return fused.rotate(x_BTHR, cos_BT1R, sin_BT1R, halves=False)
    swapped = torch.unflatten(x_BTHR, -1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x_BTHR * cos_BT1R, swapped, sin_BT1R).to(x_BTHR.dtype)


def rotate_halves(x_BTHR: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    if kernels.usable(x_BTHR, cos_BT1R):
        return fused.rotate(x_BTHR, cos_BT1R, sin_BT1R, halves=True)
    swapped = x_BTHR.roll(x_BTHR.shape[-1] // 2, -1)
    return torch.addcmul(x_BTHR * cos_BT1R, swapped, sin_BT1R).to(x_BTHR.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = narrow(x)
        out: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return fused.swiglu(gate, up) if kernels.usable(gate, up) else F.silu(gate) * up
