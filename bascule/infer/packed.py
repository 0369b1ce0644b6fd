"""The decode step of a small MLA model with its weights folded for it: a third of the operations, the same numbers.

A step of a small model on a CPU costs calls, not arithmetic. So what can be multiplied beforehand is: norm gains into the
matrices behind them, the key half of `kv_b_proj` into the queries and its value half into `o_proj` (absorbed MLA for good), the
rotary swap as rows of its own, all experts of a layer as one wide matrix with unchosen ones weighted 0. The price is a second
copy of the weights and, per token, the arithmetic of every expert: right for models of a few million parameters, wrong for
large ones (see `pack`). The cache it writes is the model's own, so reading prompts and decoding may alternate.

Letters: B rows, S slots, D hidden, H heads, C latent, R rotary, A = C+R, E experts (routed, then shared), F expert size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bascule.model.attention import LATENT_NORM_EPS, LatentAttention
from bascule.model.block import Block, PredictionLayer
from bascule.model.cache import Cache
from bascule.model.moe import MoE
from bascule.model.transformer import Transformer

LARGEST_PARAMETERS = 16_000_000
MOST_EXPERTS = 16
MOST_ROWS = 64  # above it choosing experts beats computing all of them


def pack(model: Transformer) -> PackedDecoder | None:
    """A decoder for this model's present weights, or None when it is not `packable`."""
    return PackedDecoder(model) if packable(model) else None


def packable(model: Transformer) -> bool:
    """A small model of the kind described above, in fp32 on a CPU."""
    config, weight = model.config, model.lm_head.weight
    small = sum(parameter.numel() for parameter in model.parameters()) <= LARGEST_PARAMETERS
    plain = config.attention == "mla" and config.q_lora_rank is None and not config.attention_bias
    few = config.ffn == "swiglu" or config.n_routed_experts <= MOST_EXPERTS
    return small and plain and few and weight.dtype == torch.float32 and weight.device.type == "cpu"


@dataclass(frozen=True)
class _Layer:
    """`w_in` [(H+1)*(A+R), D]: for each head, then for the shared key: latent part, rotary part, rotary part with neighbours
    swapped. `w_out` [D, H*C]. Feed-forward: `w_up` [E*2*F, D] (gate then up of each expert) and `w_down` [D, E*F]; one
    expert, the whole SwiGLU, where there is no router."""

    w_in: Tensor
    gain_C: Tensor
    w_out: Tensor
    gain_D: Tensor
    w_up: Tensor
    w_down: Tensor
    experts: int
    moe: MoE | None


class PackedDecoder:
    def __init__(self, model: Transformer) -> None:
        config = model.config
        self._model = model
        self._heads, self._latent, self._rope = (
            config.num_attention_heads,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
        )
        self._eps = config.rms_norm_eps
        with torch.no_grad():
            self._layers = [
                _pack_layer(block) for block in model.model.layers if isinstance(block, Block)
            ]
            self._w_head = model.lm_head.weight * model.model.norm.weight
            self._ahead: list[_Layer] = []
            for ahead in model.mtp:
                assert isinstance(ahead, PredictionLayer)
                gains = torch.cat([ahead.enorm.weight, ahead.hnorm.weight])
                self._w_pair = ahead.eh_proj.weight * gains
                self._w_ahead_head = model.lm_head.weight * ahead.norm.weight
                self._ahead.append(_pack_layer(ahead.block))

    def step(self, tokens_B: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """Append one token to every row of `cache`; the logits of the next, (B, V), and what the last norm makes of the row before
        its gain, (B, D). Same effect as `model(tokens, cache=cache)`."""
        x_BD = F.embedding(tokens_B, self._model.model.embed_tokens.weight)
        unit_BD = _unit(self._run(x_BD, self._layers, cache), self._eps)
        return F.linear(unit_BD, self._w_head), unit_BD

    def draft(self, hidden_ND: Tensor, next_N: Tensor, cache: Cache, last: Sequence[int]) -> Tensor:
        """Append one pair to every row of `cache`; the logits after those rows that `last` names."""
        embedded_ND = F.embedding(next_N, self._model.model.embed_tokens.weight)
        both = torch.cat([_unit(embedded_ND, self._eps), _unit(hidden_ND, self._eps)], -1)
        x_ND = self._run(F.linear(both, self._w_pair), self._ahead, cache)
        return F.linear(_unit(x_ND[last], self._eps), self._w_ahead_head)

    def _run(self, x_BD: Tensor, layers: Sequence[_Layer], cache: Cache) -> Tensor:
        batch, width = x_BD.shape[0], self._latent + self._rope
        positions_B1 = cache.open(1, ragged=False)
        rotary = self._model.model.rotary
        cos, sin = rotary.cos_PR[positions_B1], rotary.sin_PR[positions_B1]
        bias = _bias(positions_B1, cache) if cache.ragged else None
        for number, layer in enumerate(layers):
            wide = F.linear(_unit(x_BD, self._eps), layer.w_in).view(
                batch, self._heads + 1, width + self._rope
            )
            turned = torch.addcmul(wide[..., self._latent : width] * cos, wide[..., width:], sin)
            latent = _unit(wide[:, -1, : self._latent], LATENT_NORM_EPS) * layer.gain_C
            cache.write(number, torch.cat([latent, turned[:, -1]], -1).unsqueeze(1))
            q_BHA = torch.cat([wide[:, :-1, : self._latent], turned[:, :-1]], -1)
            means = [
                self._look_back(q_BHA[rows], cached_BSA, None if bias is None else bias[rows])
                for rows, (cached_BSA,) in cache.parts(number)
            ]
            mean = means[0] if len(means) == 1 else torch.cat(means)
            x_BD = torch.addmm(x_BD, mean.flatten(1), layer.w_out.t())
            x_BD = self._feed_forward(x_BD, layer)
        cache.close(1)
        return x_BD

    def _look_back(self, q_BHA: Tensor, cached_BSA: Tensor, bias: Tensor | None) -> Tensor:
        keys = cached_BSA.transpose(1, 2)
        scores = torch.bmm(q_BHA, keys) if bias is None else torch.baddbmm(bias, q_BHA, keys)
        return torch.bmm(scores.softmax(-1), cached_BSA[..., : self._latent])

    def _feed_forward(self, x_BD: Tensor, layer: _Layer) -> Tensor:
        normed = _unit(x_BD, self._eps) * layer.gain_D
        if layer.moe is not None and x_BD.shape[0] > MOST_ROWS:
            out, _ = layer.moe(normed.unsqueeze(1))
            return torch.add(x_BD, out.squeeze(1))
        gate, up = F.linear(normed, layer.w_up).view(x_BD.shape[0], layer.experts, 2, -1).unbind(2)
        inner_BEF = F.silu(gate) * up
        if layer.moe is not None:
            chosen_BK, weights_BK = layer.moe.gate(normed)
            weights_BE = torch.ones(x_BD.shape[0], layer.experts)
            weights_BE[:, : layer.moe.gate.weight.shape[0]] = 0.0
            inner_BEF = inner_BEF * weights_BE.scatter_(1, chosen_BK, weights_BK).unsqueeze(-1)
        return torch.addmm(x_BD, inner_BEF.flatten(1), layer.w_down.t())


def _pack_layer(block: Block) -> _Layer:
    attention = block.self_attn
    assert isinstance(attention, LatentAttention)
    w_in, w_out = _pack_attention(attention, block.input_layernorm.weight)
    moe = block.mlp if isinstance(block.mlp, MoE) else None
    if moe is None:
        assert not isinstance(block.mlp, MoE)
        w_up = torch.cat([block.mlp.gate_proj.weight, block.mlp.up_proj.weight])
        w_down, experts = block.mlp.down_proj.weight, 1
    else:
        w_up, w_down, experts = _pack_experts(moe)
    return _Layer(
        w_in, attention.kv_a_layernorm.weight, w_out, block.post_attention_layernorm.weight, w_up.contiguous(), w_down.contiguous(), experts, moe
    )  # fmt: skip


def _pack_attention(attention: LatentAttention, gain_D: Tensor) -> tuple[Tensor, Tensor]:
    heads, nope, latent = attention.heads, attention.nope, attention.latent
    w_kv = attention.kv_b_proj.weight.view(heads, -1, latent)
    w_key, w_value = torch.split(w_kv, [nope, attention.value], 1)
    w_query = attention.q_proj.weight.view(heads, nope + attention.rope, -1)
    q_nope, q_rope = torch.split(w_query, [nope, attention.rope], 1)
    k_latent, k_rope = torch.split(attention.kv_a_proj_with_mqa.weight, [latent, attention.rope], 0)
    q_latent = torch.bmm(w_key.transpose(1, 2), q_nope)
    queries = torch.cat([q_latent, q_rope, _swapped(q_rope)], 1) * attention.scale
    key = torch.cat([k_latent, k_rope, _swapped(k_rope)], 0).unsqueeze(0)
    w_in = torch.cat([queries, key]).flatten(0, 1) * gain_D
    o_proj = attention.o_proj.weight.view(-1, heads, attention.value).transpose(0, 1)
    w_out = torch.bmm(o_proj, w_value).transpose(0, 1).flatten(1)
    return w_in.contiguous(), w_out.contiguous()


def _pack_experts(moe: MoE) -> tuple[Tensor, Tensor, int]:
    """A shared expert of n sizes is n experts of one: the activation knows nothing of its neighbours."""
    gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
    size = down.shape[2]
    shared = moe.shared_experts
    gates, ups = (
        torch.unflatten(matrix.weight, 0, (-1, size))
        for matrix in (shared.gate_proj, shared.up_proj)
    )
    w_up = torch.cat(
        [torch.unflatten(gate_up, 1, (2, size)), torch.stack([gates, ups], 1)]
    ).flatten(0, 2)
    downs = torch.cat(
        [down, torch.unflatten(shared.down_proj.weight, 1, (-1, size)).transpose(0, 1)]
    )
    return w_up, downs.transpose(0, 1).flatten(1), downs.shape[0]


def _swapped(rows: Tensor) -> Tensor:
    """Neighbouring rows (second to last dimension) exchanged: x0,x1,x2,x3 to x1,x0,x3,x2."""
    return torch.unflatten(rows, -2, (-1, 2)).flip(-2).flatten(-3, -2)


def _unit(x: Tensor, eps: float) -> Tensor:
    """RMS norm without its gain. Four operations; torch's own is a composite of seven."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(norm.new_tensor(eps), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()


def _bias(positions_B1: Tensor, cache: Cache) -> Tensor:
    """[B, 1, S]: minus infinity on the slots past each row's own position."""
    hidden = torch.arange(cache.longest) > positions_B1
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).unsqueeze(1)
