"""The operators of kernels.py with their gradients, as plain functions for the model. Call them only where `kernels.usable` says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bascule.model import kernels  # noqa: F401  (registers the operators)

ops = torch.ops.bascule


def _apply(function: type[Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _apply(_RmsNorm, x, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + more, its norm)."""
    return _apply(_AddRmsNorm, x, more, weight, eps)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _apply(_SwiGlu, gate, up)  # type: ignore[no-any-return]


def swiglu_halves(gate_up: Tensor) -> Tensor:
    return _apply(_SwiGluHalves, gate_up)  # type: ignore[no-any-return]


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return _apply(_TokenLogprobs, logits, targets)  # type: ignore[no-any-return]


def gather_rows(x: Tensor, order: Tensor, place: Tensor, each: int) -> Tensor:
    return _apply(_GatherRows, x, order, place, each)  # type: ignore[no-any-return]


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """x[order] of [N, D]; a row may be taken often or never."""
    return _apply(_TakeRows, x, order)  # type: ignore[no-any-return]


def combine(shared: Tensor, done: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    return _apply(_Combine, shared, done, place, weights)  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, halves: bool) -> Tensor:
    return _apply(_Rotate, x, cos, sin, halves)  # type: ignore[no-any-return]


def latent_heads(
    q: Tensor, key: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _apply(_LatentHeads, q, key, kv, cos, sin, heads)  # type: ignore[no-any-return]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal; [B,H,T,E] in and out."""
    return _apply(_Attention, q, k, v, scale)  # type: ignore[no-any-return]


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = ops.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return *ops.rms_norm_backward(dy, None, *ctx.saved_tensors), None


class _AddRmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, scale, total = ops.add_rms_norm(x, more, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor, dy: Tensor) -> Any:
        dx, dw = ops.rms_norm_backward(dy, dsum, *ctx.saved_tensors)
        return dx, dx, dw, None


class _SwiGlu(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return ops.swiglu(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> Any:
        return ops.swiglu_backward(dh, *ctx.saved_tensors)


class _SwiGluHalves(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return ops.swiglu_halves(gate_up)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> Any:
        return ops.swiglu_halves_backward(dh, *ctx.saved_tensors)


class _TokenLogprobs(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logp, total = ops.token_logprobs(logits, targets)
        ctx.save_for_backward(logits, targets, total)
        return logp  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Any:
        return ops.token_logprobs_backward(d, *ctx.saved_tensors), None


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, each: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.each = each
        return ops.gather_rows(x, order, each)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return ops.gather_rows_backward(dy, *ctx.saved_tensors, ctx.each), None, None, None


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        ctx.rows = x.shape[0]
        return ops.gather_rows(x, order, 1)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return ops.add_rows(dy, *ctx.saved_tensors, ctx.rows), None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, shared: Tensor, done: Tensor, place: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(done, place, weights)
        return ops.combine(shared, done, place, weights)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ddone, dweights = ops.combine_backward(dy, *ctx.saved_tensors)
        return dy, ddone, None, dweights


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.halves = halves
        return ops.rotate(x, cos, sin, halves, False)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return ops.rotate(dy, *ctx.saved_tensors, ctx.halves, True), None, None, None


class _LatentHeads(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, key: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, heads: int
    ) -> Any:
        ctx.save_for_backward(cos, sin)
        return ops.latent_heads(q, key, kv, cos, sin, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
        return *ops.latent_heads_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, total = ops.attention(q, k, v, scale=scale)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        return *ops.attention_backward(dout, *ctx.saved_tensors, scale=ctx.scale), None
