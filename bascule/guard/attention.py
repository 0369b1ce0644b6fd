"""Fused attention is no matrix product, but it has laws of its own, and they cost little. For O = P V with P = softmax(Q K^T s):

    forward    rows of P sum to one, and O r = P (V r): one more call, with V r and ones in place of V, sees both
    backward   sum_j dV_j = sum_i dO_i, because rows of P sum to one
               sum_i q_i dq_i = sum_j k_j dk_j, because both are the sum over all scores of score times its gradient

Shapes: B batch, H heads, T queries, S keys, E head size. Bounds are the rounding of the sums involved. The laws hold without
dropout only; calls with dropout are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bascule import numerics
from bascule.model import kernels  # noqa: F401  (registers our own operators)

aten = torch.ops.aten

MARGIN = 8.0
"""Twice that of products: the largest break seen in 120 steps of `nano` at seven times the recipe's learning rate was 1.9."""


@dataclass(frozen=True)
class Fused:
    """One fused operator: forward (q, k, v first) or backward (dO, q, k, v first), and where its dropout stands."""

    backward: bool
    dropout_at: int


def _table() -> dict[Any, Fused]:
    names = {
        "_scaled_dot_product_flash_attention_for_cpu": (3, 6),
        "_scaled_dot_product_flash_attention": (3, 10),
        "_scaled_dot_product_efficient_attention": (5, 9),
    }
    table: dict[Any, Fused] = {}
    for name, (forward_at, backward_at) in names.items():
        table[getattr(aten, name).default] = Fused(False, forward_at)
        table[getattr(aten, f"{name}_backward").default] = Fused(True, backward_at)
    ours = torch.ops.bascule
    table[ours.attention.default] = Fused(False, _NO_DROPOUT)
    table[ours.attention_backward.default] = Fused(True, _NO_DROPOUT)
    return table


_NO_DROPOUT = 99
FUSED = _table()


@torch.no_grad()
def attention_ratio(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Sequence[Tensor],
    probe: Tensor,
) -> Tensor | None:
    """Largest break of a law over its bound, a scalar on the chip; None where no law applies. `probe` (E,) as for products."""
    kind = FUSED[func]
    dropout = args[kind.dropout_at] if len(args) > kind.dropout_at else kwargs.get("dropout_p", 0.0)
    if dropout:
        return None
    if kind.backward:
        inputs = args[:4]
        ratio = _backward(args[0], args[1], args[2], args[3], outputs, kwargs.get("scale"))
    else:
        inputs = args[:3]
        ratio = _forward(func, args, kwargs, outputs[0], probe)
    # An input that is already bad obeys no law (the operator that made it bad is the one to name), nor do scores that overflow.
    sizes = [torch.linalg.vector_norm(x, dtype=probe.dtype) for x in inputs]
    sound = torch.isfinite(torch.stack(sizes).prod())
    return torch.where(sound, ratio, torch.zeros_like(ratio))


def _forward(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output_BHTE: Tensor, probe: Tensor
) -> Tensor:
    v_BHSE = args[2]
    along_BHS = (v_BHSE.to(probe.dtype) * probe).sum(-1)
    stand_in = along_BHS.unsqueeze(-1).expand(v_BHSE.shape).to(v_BHSE.dtype).contiguous()
    stand_in[..., -1] = 1.0
    again_BHTE = func(args[0], args[1], stand_in, *args[3:], **kwargs)[0].to(probe.dtype)
    u, keys, size = _unit(output_BHTE), v_BHSE.shape[-2], v_BHSE.shape[-1]
    largest = torch.linalg.vector_norm(v_BHSE.to(probe.dtype), dim=-1).amax()
    along = ((output_BHTE.to(probe.dtype) * probe).sum(-1) - again_BHTE[..., 0]).abs().amax()
    mass = (again_BHTE[..., -1] - 1.0).abs().amax()
    margin = MARGIN * u * (math.sqrt(keys) + math.sqrt(size))
    return torch.maximum(along / (margin * largest + numerics.CHECKSUM_FLOOR), mass / margin)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, grads: Sequence[Tensor], scale: float | None
) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    u = _unit(q)
    dout, q, k, v = (x.to(dtype) for x in (dout, q, k, v))
    dq, dk, dv = (x.to(dtype) for x in grads[:3])
    queries, keys, size = q.shape[-2], k.shape[-2], q.shape[-1]
    norm = torch.linalg.vector_norm
    scaling = 1.0 / math.sqrt(size) if scale is None else abs(scale)
    # Backward works P out again as exp(score - logsumexp): a score's rounding, u times its size, is P's relative error.
    score = norm(q, dim=-1).amax() * norm(k, dim=-1).amax() * scaling
    margin = (
        numerics.CHECKSUM_MARGIN
        * u
        * (math.sqrt(queries) + math.sqrt(keys) + math.sqrt(size) + score)
    )
    heads = k.shape[1]
    incoming_BHE = _by_key_head(dout.sum(-2), heads)
    room_BHE = _by_key_head(torch.linalg.vector_norm(dout, dim=-2), heads) * math.sqrt(queries)
    moved = (
        (dv.sum(-2) - incoming_BHE).abs() / (margin * room_BHE + numerics.CHECKSUM_FLOOR)
    ).amax()
    energy_BH = _by_key_head((q * dq).sum((-2, -1)), heads) - (k * dk).sum((-2, -1))
    reach_BH = _by_key_head((norm(q, dim=-1) * norm(dout, dim=-1)).sum(-1), heads)
    bound_BH = (
        margin * 2.0 * scaling * reach_BH * norm(k, dim=-1).amax(-1) * norm(v, dim=-1).amax(-1)
    )
    return torch.maximum(moved, (energy_BH.abs() / (bound_BH + numerics.CHECKSUM_FLOOR)).amax())


def _by_key_head(x_BH: Tensor, heads: int) -> Tensor:
    """Add up the query heads that share a key head (grouped-query attention)."""
    return x_BH.reshape(x_BH.shape[0], heads, -1, *x_BH.shape[2:]).sum(2)


def _unit(x: Tensor) -> float:
    return numerics.tolerance(x.dtype).unit
