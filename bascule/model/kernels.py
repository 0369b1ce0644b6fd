"""What lies between the matrix products of a step, as operators of their own: `torch.ops.bascule.*`, CPU and fp32 only.

kernels.cpp computes each in one pass over memory, where PyTorch's pieces take three to twenty (docs/train.md has the figures). They
are registered with the dispatcher, so that a guard, a trace and a simulated chip see them as they see any operator. The matrix products
stay PyTorch's own. Without a C++ compiler, on another device, in another type or inside `plain()`, the model uses PyTorch's pieces.

Letters: N rows, D columns, V vocabulary, K choices a token, M = N K; B batch, H heads, T tokens, E head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bascule import native

SOURCE = Path(__file__).with_name("kernels.cpp")
CHUNKS, BLOCK, WIDTH = 32, 16, 8  # as in kernels.cpp
MOST_TOKENS = 1024
"""Longer rows go to PyTorch's attention: a block of queries with all its keys would leave the cache."""

_off = 0

_ARGUMENTS = {
    "rms_norm": "plpppppllf",
    "rms_norm_backward": "pppl" + "ppppp" + "ll",
    "swiglu": "plplpll",
    "swiglu_backward": "pplplplplll",
    "token_logprobs": "pippll",
    "token_logprobs_backward": "ppippll",
    "expert_order": "iiiill",
    "gather_rows": "piplll",
    "gather_rows_backward": "piplll",
    "add_rows": "piplll",
    "combine": "ppipplll",
    "combine_backward": "ppippp" + "lll",
    "rotate": "plpplpll" + "lll",
    "latent_heads": "pplppplppp" + "llllll",
    "latent_heads_backward": "ppppplppp" + "llllll",
    "attention": "ppppppi" + "llllllfl",
    "attention_backward": "ppppppppppi" + "llllllfl",
    "adamw": "ppppl" + "fffffff",
}
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_double}
_TYPES = {"p": torch.float32, "i": torch.int64}


@cache
def compiled() -> ctypes.CDLL | None:
    library = native.build(SOURCE).library
    for name, kinds in _ARGUMENTS.items() if library else ():
        run = getattr(library, name)
        run.argtypes, run.restype = [_KINDS[kind] for kind in kinds], None
    return library


def why_not() -> str:
    """Why there are none, "" where there are."""
    return native.build(SOURCE).why


@contextmanager
def plain() -> Iterator[None]:
    """Inside, the model runs as it does on any other chip: PyTorch's own operators only (for traces that other chips shall play)."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def usable(*tensors: Tensor) -> bool:
    """May these go through the kernels? Not where products are computed in bf16: what some of them return is no fp32 then."""
    return (
        not _off
        and not torch.is_autocast_enabled("cpu")
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and compiled() is not None
    )


def _run(name: str, *arguments: Tensor | float | None) -> None:
    """Tensors become addresses; the caller keeps them alive until this returns. Raises TypeError for a tensor of another type."""
    for kind, x in zip(_ARGUMENTS[name], arguments, strict=True):
        if isinstance(x, Tensor) and x.dtype != _TYPES[kind]:
            raise TypeError(f"bascule::{name} was given {x.dtype}, it computes with {_TYPES[kind]}")
    getattr(compiled(), name)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))


def _need(met: bool, what: str) -> None:
    """The kernels trust the shapes they are given; one that does not fit would be read or written past its end."""
    if not met:
        raise RuntimeError(f"shapes that do not belong together: {what}")


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as [N, D] with a dense last dimension, and the distance between its rows."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[-1] > 1 and flat.stride(-1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0) if flat.shape[0] > 1 else flat.shape[-1]


_library = torch.library.Library("bascule", "DEF")  # type: ignore[no-untyped-call]


def _operator(schema: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    def register(function: Callable[..., object]) -> Callable[..., object]:
        _library.define(schema)  # type: ignore[no-untyped-call]
        _library.impl(schema.partition("(")[0], function, "CPU")  # type: ignore[no-untyped-call]
        return function

    return register


@_operator("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed like x but dense, 1/rms [N])."""
    _need(weight.shape == x.shape[-1:], "rms_norm's weight and rows")
    weight = weight.contiguous()
    flat, stride = _rows(x)
    y, scale = torch.empty(x.shape), torch.empty(len(flat))
    _run("rms_norm", flat, stride, None, None, weight, y, scale, *flat.shape, eps)
    return y, scale


@_operator("add_rms_norm(Tensor x, Tensor more, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")  # fmt: skip
def _add_rms_norm(
    x: Tensor, more: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed sum, 1/rms [N], sum)."""
    _need(weight.shape == x.shape[-1:] and more.shape == x.shape, "add_rms_norm's terms and weight")
    weight = weight.contiguous()
    flat, stride = _rows(x)
    more = more.contiguous()
    y, scale, total = torch.empty(x.shape), torch.empty(len(flat)), torch.empty(x.shape)
    _run("rms_norm", flat, stride, more, total, weight, y, scale, *flat.shape, eps)
    return y, scale, total


@_operator("rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)")  # fmt: skip
def _rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    same = dy.shape == x.shape and (dsum is None or dsum.shape == x.shape)
    _need(same and weight.shape == x.shape[-1:] and scale.numel() * x.shape[-1] == x.numel(), "rms_norm_backward")  # fmt: skip
    weight, scale = weight.contiguous(), scale.contiguous()
    flat, stride = _rows(x)
    dy, dsum = dy.contiguous(), None if dsum is None else dsum.contiguous()
    dx, dw = torch.empty(x.shape), torch.empty(weight.shape)
    parts = torch.empty(CHUNKS, x.shape[-1])
    _run("rms_norm_backward", dy, dsum, flat, stride, weight, scale, dx, parts, dw, *flat.shape)
    return dx, dw


@_operator("swiglu(Tensor gate, Tensor up) -> Tensor")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    _need(gate.shape == up.shape, "swiglu's gate and up")
    (g, sg), (u, su) = _rows(gate), _rows(up)
    h = torch.empty(gate.shape)
    _run("swiglu", g, sg, u, su, h, *g.shape)
    return h


@_operator("swiglu_backward(Tensor dh, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def _swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    _need(dh.shape == gate.shape == up.shape, "swiglu_backward")
    (g, sg), (u, su), dh = _rows(gate), _rows(up), dh.contiguous()
    dgate, dup, n = torch.empty(gate.shape), torch.empty(up.shape), g.shape[1]
    _run("swiglu_backward", dh, g, sg, u, su, dgate, n, dup, n, *g.shape)
    return dgate, dup


@_operator("swiglu_halves(Tensor gate_up) -> Tensor")
def _swiglu_halves(gate_up: Tensor) -> Tensor:
    """Of rows that hold the gate, then the up half."""
    gate, up = gate_up.chunk(2, -1)
    return _swiglu(gate, up)  # type: ignore[return-value]


@_operator("swiglu_halves_backward(Tensor dh, Tensor gate_up) -> Tensor")
def _swiglu_halves_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    _need(dh.shape == (*gate_up.shape[:-1], gate_up.shape[-1] // 2) and gate_up.shape[-1] % 2 == 0, "swiglu_halves_backward")  # fmt: skip
    (both, stride), dh = _rows(gate_up), dh.contiguous()
    grad = torch.empty(gate_up.shape)
    rows, n = both.shape[0], both.shape[1] // 2
    gate, up = both[:, :n], both[:, n:]
    dgate, dup = torch.split(grad.view(rows, 2 * n), n, -1)
    _run("swiglu_backward", dh, gate, stride, up, stride, dgate, 2 * n, dup, 2 * n, rows, n)
    return grad


@_operator("token_logprobs(Tensor logits, Tensor targets) -> (Tensor, Tensor)")
def _token_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of each row's target, the sum of exp(logit - largest logit) of each row), shaped like `targets`."""
    _need(targets.shape == logits.shape[:-1], "token_logprobs' targets and rows")
    logits, targets = logits.contiguous(), targets.contiguous()
    _within(targets, logits.shape[-1])
    logp, total = torch.empty(targets.shape), torch.empty(targets.shape)
    _run("token_logprobs", logits, targets, logp, total, targets.numel(), logits.shape[-1])
    return logp, total


@_operator("token_logprobs_backward(Tensor d, Tensor logits, Tensor targets, Tensor total) -> Tensor")  # fmt: skip
def _token_logprobs_backward(d: Tensor, logits: Tensor, targets: Tensor, total: Tensor) -> Tensor:
    _need(d.shape == targets.shape == total.shape == logits.shape[:-1], "token_logprobs_backward")
    _within(targets, logits.shape[-1])
    total = total.contiguous()
    d, logits, targets = d.contiguous(), logits.contiguous(), targets.contiguous()
    dx, shape = torch.empty(logits.shape), (targets.numel(), logits.shape[-1])
    _run("token_logprobs_backward", d, logits, targets, total, dx, *shape)
    return dx


@_operator("expert_order(Tensor chosen, int experts) -> (Tensor, Tensor, Tensor)")
def _expert_order(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(choice at each place when sorted by expert [M], place of each choice [M], how often each expert was chosen [experts])."""
    chosen = chosen.contiguous()
    _within(chosen, experts)
    order, place = torch.empty_like(chosen).view(-1), torch.empty_like(chosen).view(-1)
    counts = torch.empty(experts, dtype=torch.int64)
    _run("expert_order", chosen, order, place, counts, chosen.numel(), experts)
    return order, place, counts


@_operator("gather_rows(Tensor x, Tensor order, int each) -> Tensor")
def _gather_rows(x: Tensor, order: Tensor, each: int) -> Tensor:
    """Row `order[m] // each` of x for every m."""
    _need(x.ndim == 2 and order.ndim == 1 and each > 0, "gather_rows")
    _within(order, len(x) * each)
    order = order.contiguous()
    x, y = x.contiguous(), torch.empty(len(order), x.shape[-1])
    _run("gather_rows", x, order, y, len(order), each, x.shape[-1])
    return y


@_operator("gather_rows_backward(Tensor dy, Tensor place, int each) -> Tensor")
def _gather_rows_backward(dy: Tensor, place: Tensor, each: int) -> Tensor:
    _need(dy.ndim == 2 and place.ndim == 1 and each > 0 and len(place) % each == 0, "gather_rows_backward")  # fmt: skip
    _within(place, len(dy))
    place = place.contiguous()
    dy, dx = dy.contiguous(), torch.empty(len(place) // each, dy.shape[-1])
    _run("gather_rows_backward", dy, place, dx, len(dx), each, dy.shape[-1])
    return dx


@_operator("add_rows(Tensor dy, Tensor order, int rows) -> Tensor")
def _add_rows(dy: Tensor, order: Tensor, rows: int) -> Tensor:
    """[rows, D]: row `order[m]` is the sum of the dy[m] that name it."""
    _need(dy.ndim == 2 and order.shape == dy.shape[:1] and rows > 0, "add_rows")
    _within(order, rows)
    order = order.contiguous()
    dy, dx = dy.contiguous(), torch.empty(rows, dy.shape[-1])
    _run("add_rows", dy, order, dx, len(order), rows, dy.shape[-1])
    return dx


@_operator("combine(Tensor shared, Tensor done, Tensor place, Tensor weights) -> Tensor")
def _combine(shared: Tensor, done: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """shared[n] + sum over k of weights[n,k] done[place[n,k]]."""
    _need(done.ndim == weights.ndim == 2 and shared.numel() == len(weights) * shared.shape[-1], "combine's tokens")  # fmt: skip
    _need(done.shape[1] == shared.shape[-1] and place.numel() == weights.numel(), "combine's rows")
    _within(place, len(done))
    place = place.contiguous()
    shared, done, weights = shared.contiguous(), done.contiguous(), weights.contiguous()
    y = torch.empty(shared.shape)
    _run("combine", shared, done, place, weights, y, *weights.shape, shared.shape[-1])
    return y


@_operator("combine_backward(Tensor dy, Tensor done, Tensor place, Tensor weights) -> (Tensor, Tensor)")  # fmt: skip
def _combine_backward(
    dy: Tensor, done: Tensor, place: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    _need(done.ndim == weights.ndim == 2 and dy.numel() == len(weights) * dy.shape[-1], "combine_backward's tokens")  # fmt: skip
    _need(done.shape[1] == dy.shape[-1] and place.numel() == weights.numel() == len(done), "combine_backward's rows")  # fmt: skip
    _within(place, len(done))
    place = place.contiguous()
    dy, done, weights = dy.contiguous(), done.contiguous(), weights.contiguous()
    ddone, dweights = torch.empty(done.shape), torch.empty(weights.shape)
    _run("combine_backward", dy, done, place, weights, ddone, dweights, *weights.shape, dy.shape[-1])  # fmt: skip
    return ddone, dweights


@_operator("rotate(Tensor x, Tensor cos, Tensor sin, bool halves, bool back) -> Tensor")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool, back: bool) -> Tensor:
    """x [B,T,H,R]; tables [1 or B,T,1,R]. `back` turns the other way, which is what a gradient wants."""
    batch, tokens, heads, size = x.shape
    _need(cos.shape == sin.shape and cos.shape[1:] == (tokens, 1, size) and cos.shape[0] in (1, batch), "rotate's tables")  # fmt: skip
    flat, stride = _rows(x.flatten(2))
    y = torch.empty(x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    period = cos.numel() // size
    _run("rotate", flat, stride, cos, sin, period, y, batch * tokens, heads, size, halves, back)
    return y


@_operator("latent_heads(Tensor q, Tensor key, Tensor kv, Tensor cos, Tensor sin, int heads) -> (Tensor, Tensor, Tensor)")  # fmt: skip
def _latent_heads(
    q: Tensor, key: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """MLA's queries, keys (the shared rotary one beside each head's own) and values by head, turned: [B,H,T,E] each."""
    batch, tokens, rotary = key.shape
    _need(q.shape[:2] == kv.shape[:2] == (batch, tokens) and q.shape[-1] % heads == kv.shape[-1] % heads == 0, "latent_heads")  # fmt: skip
    _need(cos.shape == sin.shape and cos.shape[1:] == (tokens, 1, rotary) and cos.shape[0] in (1, batch), "latent_heads' tables")  # fmt: skip
    _need(rotary <= q.shape[-1] // heads < rotary + kv.shape[-1] // heads, "latent_heads' widths")
    q, kv, cos, sin = q.contiguous(), kv.contiguous(), cos.contiguous(), sin.contiguous()
    flat, stride = _rows(key)
    size = q.shape[-1] // heads
    nope, value = size - rotary, kv.shape[-1] // heads - size + rotary
    qh, kh, vh = (torch.empty(batch, heads, tokens, n) for n in (size, size, value))
    shape = (batch, tokens, heads, nope, rotary, value)
    _run("latent_heads", q, flat, stride, kv, cos, sin, cos.numel() // rotary, qh, kh, vh, *shape)
    return qh, kh, vh


@_operator("latent_heads_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)")  # fmt: skip
def _latent_heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, cos, sin = (x.contiguous() for x in (dq, dk, dv, cos, sin))
    (batch, heads, tokens, size), value, rotary = dq.shape, dv.shape[-1], cos.shape[-1]
    _need(dk.shape == dq.shape and dv.shape[:3] == dq.shape[:3] and rotary <= size, "latent_heads_backward")  # fmt: skip
    _need(cos.shape == sin.shape and cos.shape[1:] == (tokens, 1, rotary) and cos.shape[0] in (1, batch), "latent_heads_backward's tables")  # fmt: skip
    nope = size - rotary
    widths = (heads * size, rotary, heads * (nope + value))
    back = tuple(torch.empty(batch, tokens, n) for n in widths)
    shape = (batch, tokens, heads, nope, rotary, value)
    _run("latent_heads_backward", dq, dk, dv, cos, sin, cos.numel() // rotary, *back, *shape)
    return back  # type: ignore[return-value]


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Does the kernel know attention of these shapes [B,H,T,E]? Longer rows and odd head sizes are PyTorch's."""
    return (
        q.shape[2] == k.shape[2] <= MOST_TOKENS
        and q.shape[3] % WIDTH == 0
        and v.shape[3] % WIDTH == 0
        and usable(q, k, v)
    )


def _fit(q: Tensor, k: Tensor, v: Tensor) -> None:
    batch, heads, tokens, size = q.shape
    _need(k.shape[::2] == v.shape[::2] == (batch, tokens), "attention's rows")
    _need(k.shape[1] == v.shape[1] and heads % k.shape[1] == 0 and k.shape[3] == size, "attention's heads")  # fmt: skip
    _need(size % WIDTH == v.shape[3] % WIDTH == 0, "attention's head sizes")


@_operator("attention(Tensor query, Tensor key, Tensor value, *, float scale) -> (Tensor, Tensor)")
def _attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention: (averages [B,H,T,E], lying in memory by token, and the logsumexp of every row's scores [B,H,T])."""
    _fit(q, k, v)
    q, k, v = (_dense(x) for x in (q, k, v))
    (batch, heads, tokens, size), value = q.shape, v.shape[3]
    out = torch.empty(batch, tokens, heads, value).transpose(1, 2)
    total, threads = torch.empty(batch, heads, tokens), torch.get_num_threads()
    scratch = torch.empty(threads, size + BLOCK, _padded(tokens))
    strides = _strides(q, k, v, out)
    shape = (batch, heads, k.shape[1], tokens, size, value)
    _run("attention", q, k, v, out, total, scratch, strides, *shape, scale, threads)
    return out, total


@_operator("attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor total, *, float scale) -> (Tensor, Tensor, Tensor)")  # fmt: skip
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _fit(q, k, v)
    made = (*q.shape[:3], v.shape[3])
    _need(dout.shape == out.shape == made and total.shape == q.shape[:3], "attention_backward")
    dout, q, k, v, out = (_dense(x) for x in (dout, q, k, v, out))
    total = total.contiguous()
    (batch, heads, tokens, size), value = q.shape, v.shape[3]
    dq, dk, dv = (torch.empty(x.shape) for x in (q, k, v))
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, size + value + 2 * BLOCK, _padded(tokens))
    strides = _strides(q, k, v, out, dout)
    shape = (batch, heads, k.shape[1], tokens, size, value)
    _run("attention_backward", dout, q, k, v, out, total, dq, dk, dv, scratch, strides, *shape, scale, threads)  # fmt: skip
    return dq, dk, dv


@_operator(
    "adamw_(Tensor(a!) p, Tensor(b!) first, Tensor(c!) second, Tensor grad, float grad_scale, float beta1, float beta2, "
    "float keep, float rate, float correction, float eps) -> Tensor(a!)"
)
def _adamw_(p: Tensor, first: Tensor, second: Tensor, grad: Tensor, *numbers: float) -> Tensor:
    """p = keep p - rate first / (sqrt(correction second) + eps), moments updated with grad_scale grad before."""
    same = p.shape == first.shape == second.shape == grad.shape
    _need(
        same and all(x.is_contiguous() for x in (p, first, second)), "adamw_'s weight and moments"
    )
    _run("adamw", p, first, second, grad.contiguous(), p.numel(), *numbers)
    return p


def _within(indices: Tensor, end: int) -> None:
    """The kernels trust their indices; a wrong one must not read or write elsewhere."""
    if indices.numel() and not (int(indices.amin()) >= 0 and int(indices.amax()) < end):
        raise IndexError(f"index {int(indices.amin())} .. {int(indices.amax())} out of range 0 .. {end - 1}")  # fmt: skip


def _padded(tokens: int) -> int:
    return -(-tokens // WIDTH) * WIDTH


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([x.stride()[:3] for x in tensors], dtype=torch.int64)
