"""Our own CPU operators give what PyTorch's pieces give, forward and backward, in one thread as in two."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bascule.config.model import ModelConfig
from bascule.model import fused, kernels, weights
from bascule.model.layers import rotate_halves, rotate_neighbours
from bascule.model.transformer import Transformer

pytestmark = pytest.mark.skipif(
    kernels.compiled() is None, reason="no C++ compiler here: the model uses PyTorch's pieces"
)
Function = Callable[..., Tensor | tuple[Tensor, ...]]
ROWS = 150


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def results(function: Function, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """What it returns and the gradients of its inputs."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    made = function(*leaves)
    made = made if isinstance(made, tuple) else (made,)
    back = [normal(*x.shape, seed=9).to(dtype) for x in made]
    grads = torch.autograd.grad(made, leaves, back)
    return [x.detach() for x in (*made, *grads)]


def held(ours: Function, theirs: Function, *inputs: Tensor) -> None:
    """Within some roundings of fp64, scaled by each tensor's largest value, and bit for bit the same with two threads."""
    torch.set_num_threads(1)
    found = results(ours, inputs, torch.float32)
    with kernels.plain():
        right = results(theirs, inputs, torch.float64)
    for mine, other in zip(found, right, strict=True):
        assert mine.shape == other.shape
        assert float((mine - other).abs().max()) <= 3e-6 * float(other.abs().max()) + 1e-12
    torch.set_num_threads(2)
    for once, again in zip(found, results(ours, inputs, torch.float32), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("size", [96, 48, 20, 7])
def test_norms_and_gates(size: int) -> None:
    x, more, weight = normal(ROWS, size), normal(ROWS, size, seed=1), normal(size, seed=2)
    wide = normal(ROWS, 2 * size, scale=3.0)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (size,), weight, 1e-6)

    held(lambda x, w: fused.rms_norm(x, w, 1e-6), norm, x, weight)
    held(
        lambda x, w: fused.rms_norm(x[:, :size], w, 1e-6), lambda x, w: norm(x[:, :size], w),
        wide, weight,
    )  # fmt: skip
    held(
        lambda x, more, w: fused.add_rms_norm(x, more, w, 1e-6),
        lambda x, more, w: (x + more, norm(x + more, w)),
        x, more, weight,
    )  # fmt: skip
    held(fused.swiglu, lambda gate, up: F.silu(gate) * up, 5 * x, more)
    held(fused.swiglu_halves, lambda both: F.silu(both[:, :size]) * both[:, size:], wide)


def test_log_probabilities_of_targets_and_a_zero_gradient_where_none_counts() -> None:
    logits, targets = normal(ROWS, 37, scale=10.0), torch.arange(ROWS) % 37

    def plain(x: Tensor) -> Tensor:
        return x.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    held(lambda x: fused.token_logprobs(x, targets), plain, logits)
    mask = torch.arange(ROWS) % 2
    held(lambda x: fused.token_logprobs(x, targets) * mask, lambda x: plain(x) * mask, logits)
    with pytest.raises(IndexError, match="37"):
        fused.token_logprobs(logits, targets + 1)


@pytest.mark.parametrize("each", [1, 3])
def test_experts_are_sorted_gathered_and_combined(each: int) -> None:
    experts = 8
    keys = torch.rand(ROWS, experts, generator=torch.Generator().manual_seed(0))
    chosen = keys.argsort(-1)[:, :each].contiguous()
    order, place, counts = torch.ops.bascule.expert_order(chosen, experts)
    assert torch.equal(order, chosen.flatten().sort(stable=True).indices)
    assert torch.equal(counts, chosen.flatten().bincount(minlength=experts))
    x, done, share = normal(ROWS, 24), normal(ROWS * each, 24), torch.rand(ROWS, each)
    held(lambda x: fused.gather_rows(x, order, place, each), lambda x: x[order // each], x)
    often = torch.tensor([3, 0, 3, 5, 3, 0])
    held(lambda x: fused.take_rows(x, often), lambda x: x[often], x)
    held(
        lambda x, done, share: fused.combine(x, done, place, share),
        lambda x, done, share: x + (done[place].view(ROWS, each, 24) * share[..., None]).sum(1),
        x, done, share,
    )  # fmt: skip


def tables(tokens: int, size: int, halves: bool) -> tuple[Tensor, Tensor]:
    angle = torch.rand(1, tokens, 1, size // 2, generator=torch.Generator().manual_seed(0)) * 6
    cos, sin = angle.cos(), angle.sin()
    if halves:
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)


def test_rotation_and_the_heads_of_latent_attention() -> None:
    batch, tokens, heads, nope, rotary, value = 3, 50, 4, 16, 8, 24
    for halves, plain in ((True, rotate_halves), (False, rotate_neighbours)):
        cos, sin = tables(tokens, rotary, halves)
        held(
            lambda x, cos=cos, sin=sin, halves=halves: fused.rotate(x, cos, sin, halves=halves),
            lambda x, cos=cos, sin=sin, plain=plain: plain(x, cos.double(), sin.double()),
            normal(batch, tokens, heads, rotary),
        )  # fmt: skip
    cos, sin = tables(tokens, rotary, halves=False)

    def pieces(q: Tensor, key: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
        q_nope, q_rope = q.unflatten(-1, (heads, -1)).split([nope, rotary], -1)
        k_nope, v = kv.unflatten(-1, (heads, -1)).split([nope, value], -1)
        q_rope = rotate_neighbours(q_rope, cos.double(), sin.double())
        key = rotate_neighbours(key.unsqueeze(2), cos.double(), sin.double())
        q = torch.cat([q_nope, q_rope], -1)
        k = torch.cat([k_nope, key.expand(-1, -1, heads, -1)], -1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    held(
        lambda q, key, kv: fused.latent_heads(q, key, kv, cos, sin, heads), pieces,
        normal(batch, tokens, heads * (nope + rotary)), normal(batch, tokens, rotary, seed=1),
        normal(batch, tokens, heads * (nope + value), seed=2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "size", "value"),
    [(48, 4, 4, 24, 24), (50, 4, 2, 16, 32), (3, 2, 1, 8, 8), (130, 2, 2, 64, 64), (17, 4, 1, 40, 16)],
)  # fmt: skip
def test_causal_attention(tokens: int, heads: int, kv_heads: int, size: int, value: int) -> None:
    held(
        lambda q, k, v: fused.attention(q, k, v, 0.3),
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.3, enable_gqa=heads != kv_heads
        ),
        normal(2, heads, tokens, size), normal(2, kv_heads, tokens, size, seed=1),
        normal(2, kv_heads, tokens, value, seed=2),
    )  # fmt: skip


def test_what_is_not_a_number_stays_visible() -> None:
    q = normal(1, 2, 20, 8)
    for bad in (float("nan"), float("inf")):
        spoilt = q.clone()
        spoilt[0, 0, 3, 0] = bad
        assert not torch.isfinite(fused.attention(spoilt, spoilt, q, 1.0)[0, 0]).all()
        rows = normal(3, 16)
        rows[1, 2] = bad
        assert not torch.isfinite(fused.rms_norm(rows, torch.ones(16), 1e-6)[1]).all()
        assert not torch.isfinite(fused.token_logprobs(rows, torch.zeros(3).long())[1])
    assert torch.isnan(fused.swiglu(torch.tensor([[float("nan")]]), torch.ones(1, 1))).all()


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_a_whole_model_agrees_with_pytorchs_pieces(attention: str) -> None:
    config = ModelConfig(preset="tick", attention=attention)
    model = Transformer(config)
    weights.initialise(model, 0)
    tokens = torch.arange(8 * 32).view(8, 32) * 7 % 101
    with kernels.plain():
        right = gradients(model, tokens)
    for name, found in gradients(model, tokens).items():
        scale = float(right[name].abs().max())
        assert float((found - right[name]).abs().max()) <= 1e-4 * scale + 1e-12, name


def gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    logits = model(tokens).logits_BTV[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_a_row_does_not_depend_on_its_batch() -> None:
    q = normal(6, 2, 30, 16)
    whole = fused.attention(q, q, q, 0.25)
    assert torch.equal(whole[2:3], fused.attention(q[2:3], q[2:3], q[2:3], 0.25))


NAMES = [
    "rms_norm",
    "add_rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "swiglu_halves_backward",
    "token_logprobs",
    "token_logprobs_backward",
    "gather_rows",
    "gather_rows_backward",
    "add_rows",
    "combine",
    "combine_backward",
    "rotate",
    "latent_heads",
    "latent_heads_backward",
    "attention",
    "attention_backward",
    "adamw_",
]


def _calls() -> dict[str, tuple[object, ...]]:
    """Right arguments of every operator."""
    x, w, n = normal(6, 16), torch.ones(16), torch.ones(6)
    q, chosen = normal(2, 2, 5, 8), torch.tensor([[0, 1], [1, 2], [2, 0]])
    order, place, _ = torch.ops.bascule.expert_order(chosen, 3)
    table, key, targets = normal(1, 5, 1, 8), normal(2, 5, 8), torch.zeros(6).long()
    out, total = torch.ops.bascule.attention(q, q, q, scale=0.3)
    return {
        "rms_norm": (x, w, 1e-6),
        "add_rms_norm": (x, x, w, 1e-6),
        "rms_norm_backward": (x, x, x, w, n),
        "swiglu": (x, x),
        "swiglu_backward": (x, x, x),
        "swiglu_halves_backward": (normal(6, 8), x),
        "token_logprobs": (x, targets),
        "token_logprobs_backward": (n, x, targets, n),
        "gather_rows": (x[:3], order, 2),
        "gather_rows_backward": (x, place, 2),
        "add_rows": (x, order, 6),
        "combine": (x[:3], x, place, normal(3, 2)),
        "combine_backward": (x[:3], x, place, normal(3, 2)),
        "rotate": (normal(2, 5, 3, 8), table, table, True, False),
        "latent_heads": (normal(2, 5, 32), key, normal(2, 5, 32), table, table, 2),
        "latent_heads_backward": (normal(2, 2, 5, 16), normal(2, 2, 5, 16), q, table, table),
        "attention": (q, q, q),
        "attention_backward": (q, q, q, q, out, total),
        "adamw_": (x, x.clone(), x.clone(), x, 1.0, 0.9, 0.99, 1.0, 1e-3, 1.0, 1e-8),
    }


STILL_RIGHT = {
    ("token_logprobs", 0), ("token_logprobs_backward", 1), ("gather_rows", 0), ("gather_rows", 1),
    ("gather_rows_backward", 0), ("add_rows", 0), ("latent_heads_backward", 2),
}  # fmt: skip
"""Arguments that may be narrower alone."""


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_types_that_do_not_fit_are_refused(name: str) -> None:
    """Qualification shrinks calls and repeats them in fp64; a kernel that trusted its shapes ended the process there."""
    operator = getattr(torch.ops.bascule, name)
    more = {"scale": 0.3} if name.startswith("attention") else {}
    right = _calls()[name]
    operator(*right, **more)
    for at, value in enumerate(right):
        if isinstance(value, Tensor):
            wrong = value.double() if value.is_floating_point() else value.int()
            with pytest.raises((TypeError, RuntimeError)):
                operator(*right[:at], wrong, *right[at + 1 :], **more)
            if (name, at) not in STILL_RIGHT:
                with pytest.raises((RuntimeError, IndexError)):
                    operator(*right[:at], value[..., :-1], *right[at + 1 :], **more)
