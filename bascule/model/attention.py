"""Two attentions: grouped-query (GQA) and multi-head latent (MLA, DeepSeek-V2 section 2.1).

Masks. Training batches are right-padded and need no mask: a causal row never sees the padding behind it. A key mask [B, T]
(true = real token) makes padding invisible wherever it lies; the diagonal stays open, so a padded row attends to itself
instead of to nothing (a softmax over nothing is NaN).

With a cache, a call whose cache is empty attends among its own tokens; a later call reads the cache. MLA then works
*absorbed*: the key half of `kv_b_proj` is folded into the query and the value half is applied after the average, so a step reads
C+R numbers a token instead of 2*H*head size.

Letters: B rows, T tokens, S cached slots, D hidden, H query heads, K key-value heads, G = H/K, E head size; MLA: N nope size,
R rotary size, V value size, C latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bascule.config.model import ModelConfig
from bascule.model import fused, kernels
from bascule.model.cache import Context
from bascule.model.layers import RMSNorm, rotate_halves, rotate_neighbours
from bascule.model.precision import narrow
from bascule.model.rope import score_gain

LATENT_NORM_EPS = 1e-6
"""transformers fixes this for `q_a_layernorm` and `kv_a_layernorm`, whatever `rms_norm_eps` says."""


def padding_bias(mask_BT: Tensor, dtype: torch.dtype, documents_BT: Tensor | None = None) -> Tensor:
    """Additive causal bias [B, 1, T, T] that hides the keys where `mask_BT` is false, except from themselves; with
    `documents_BT` (a number for each token) also the keys of other documents."""
    tokens = mask_BT.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask_BT.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=mask_BT.device)
    seen = (causal & mask_BT.bool()[:, None, None, :]) | itself
    if documents_BT is not None:
        seen = seen & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, float("-inf")
    )


def cached_bias(positions_BT: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """Additive bias [B, T, 1, S]: a token at position p sees the slots 0..p of its row."""
    hidden = torch.arange(slots, device=positions_BT.device) > positions_BT[:, :, None, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(
        hidden, float("-inf")
    )


def attend(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Attention of a call's tokens among themselves: causal, unless an additive bias says more. [B,T,H*V]."""
    if bias is None and kernels.attends(q_BHTE, k_BKTE, v_BKTE):
        return fused.attention(q_BHTE, k_BKTE, v_BKTE, scale).transpose(1, 2).flatten(2)
    out_BHTV = F.scaled_dot_product_attention(
        q_BHTE, k_BKTE, v_BKTE, attn_mask=bias, is_causal=bias is None, scale=scale,
        enable_gqa=q_BHTE.shape[1] != k_BKTE.shape[1],
    )  # fmt: skip
    return out_BHTV.transpose(1, 2).flatten(2)


def _scores(q_BMA: Tensor, keys_BSA: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """q @ keys^T plus the bias of [B, T, 1, S], where M runs over T then over `heads`."""
    if bias is None:
        return torch.bmm(q_BMA, keys_BSA.transpose(1, 2))
    bias = bias.expand(-1, -1, heads, -1).reshape(q_BMA.shape[0], -1, keys_BSA.shape[1])
    return torch.baddbmm(bias, q_BMA, keys_BSA.transpose(1, 2))


class GroupedQueryAttention(nn.Module):
    """GQA with Llama's rotary pairing; `qk_norm` norms queries and keys per head before turning (Qwen3)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads = (
            layer,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.size, bias = config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.size, bias=bias)
        out_bias = bias and config.attention_output_bias
        self.o_proj = nn.Linear(self.heads * self.size, config.hidden_size, bias=out_bias)
        self.q_norm = RMSNorm(self.size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.size, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = narrow(x_BTD)
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if context.seats is not None:
            q, k, v = map(context.seats.spread, (q, k, v))
        q_BTHE = q.unflatten(-1, (self.heads, self.size))
        k_BTKE = k.unflatten(-1, (self.kv_heads, self.size))
        v_BTKE = v.unflatten(-1, (self.kv_heads, self.size))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        q_BTHE = rotate_halves(q_BTHE, context.cos_BT1R, context.sin_BT1R)
        k_BTKE = rotate_halves(k_BTKE, context.cos_BT1R, context.sin_BT1R)
        if context.cache is not None:
            context.cache.write(self.layer, k_BTKE, v_BTKE)
        if context.read:
            out_BTD = self._attend_cached(q_BTHE, context)
        else:
            q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
            out_BTD = attend(q, k, v, context.bias, self.size**-0.5)
        if context.seats is not None:
            out_BTD = context.seats.collect(out_BTD)
        result: Tensor = self.o_proj(out_BTD)
        return result

    def _attend_cached(self, q_BTHE: Tensor, context: Context) -> Tensor:
        """The heads of a group become more queries of their key-value head, so keys are never repeated in memory."""
        assert context.cache is not None
        batch, tokens = q_BTHE.shape[:2]
        group = self.heads // self.kv_heads
        q = (q_BTHE * self.size**-0.5).view(batch, tokens, self.kv_heads, group, self.size)
        q_KBME = q.permute(2, 0, 1, 3, 4).reshape(self.kv_heads, batch, tokens * group, self.size)
        bias = context.bias
        if bias is not None:
            bias = bias.expand(-1, -1, group, -1).flatten(1, 2)
        parts = []
        for rows, (keys_BSKE, values_BSKE) in context.cache.parts(self.layer):
            scores = q_KBME[:, rows] @ keys_BSKE.permute(2, 0, 3, 1)
            if bias is not None:
                scores = scores + bias[rows]
            parts.append(scores.softmax(-1) @ values_BSKE.permute(2, 0, 1, 3))
        out = torch.cat(parts, 1).view(self.kv_heads, batch, tokens, group, self.size)
        out = out.permute(1, 2, 0, 3, 4)
        result: Tensor = out.reshape(batch, tokens, self.heads * self.size)
        return result


class LatentAttention(nn.Module):
    """MLA. Weights carry DeepSeek-V3's names and layouts: `kv_b_proj` rows run over heads, nope then value in each."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        self.scale = (self.nope + self.rope) ** -0.5 * score_gain(config.rope_scaling)
        hidden, bias = config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, self.heads * (self.nope + self.rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(
                config.q_lora_rank, self.heads * (self.nope + self.rope), bias=False
            )
        self.low_rank_queries = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = narrow(x_BTD)
        q = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
            if self.low_rank_queries
            else self.q_proj(x_BTD)
        )
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split([self.latent, self.rope], -1)
        latent_BTC, seats = self.kv_a_layernorm(latent), context.seats
        if seats is not None:
            q, k_rope = seats.spread(q), seats.spread(k_rope)
        if context.cache is None and kernels.usable(q, k_rope, context.cos_BT1R):
            kv = self.kv_b_proj(latent_BTC)
            if seats is not None:
                kv = seats.spread(kv)
            q, k, v = fused.latent_heads(
                q, k_rope, kv, context.cos_BT1R, context.sin_BT1R, self.heads
            )
            out = attend(q, k, v, context.bias, self.scale)
            done: Tensor = self.o_proj(out if seats is None else seats.collect(out))
            return done
        if seats is not None:
            latent_BTC = seats.spread(latent_BTC)
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], -1)
        # The shared key turns together with the queries: one rotation over H+1 heads instead of two.
        turned = rotate_neighbours(
            torch.cat([q_rope, k_rope.unsqueeze(2)], 2), context.cos_BT1R, context.sin_BT1R
        )
        q_rope, k_rope_BT1R = torch.split(turned, [self.heads, 1], 2)
        if context.cache is not None:
            context.cache.write(self.layer, torch.cat([latent_BTC, k_rope_BT1R.squeeze(2)], -1))
        if context.read:
            out_BTD = self._attend_absorbed(q_nope, q_rope, context)
        else:
            out_BTD = self._attend_expanded(q_nope, q_rope, latent_BTC, k_rope_BT1R, context)
        if seats is not None:
            out_BTD = seats.collect(out_BTD)
        result: Tensor = self.o_proj(out_BTD)
        return result

    def _attend_expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent_BTC: Tensor,
        k_rope_BT1R: Tensor,
        context: Context,
    ) -> Tensor:
        k_nope, v = (
            self.kv_b_proj(latent_BTC)
            .unflatten(-1, (self.heads, -1))
            .split([self.nope, self.value], -1)
        )
        q = torch.cat([q_nope, q_rope], -1).transpose(1, 2)
        k = torch.cat([k_nope, k_rope_BT1R.expand(-1, -1, self.heads, -1)], -1).transpose(1, 2)
        return attend(q, k, v.transpose(1, 2), context.bias, self.scale)

    def _attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, context: Context) -> Tensor:
        assert context.cache is not None
        batch, tokens = q_nope.shape[:2]
        w_key, w_value = torch.split(
            self.kv_b_proj.weight.view(self.heads, -1, self.latent), [self.nope, self.value], 1
        )
        q_latent = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_key).transpose(0, 1)
        q = torch.cat([q_latent, q_rope.flatten(0, 1)], -1) * self.scale
        q_BMA = q.view(batch, tokens * self.heads, -1)
        parts = []
        for rows, (cached_BSA,) in context.cache.parts(self.layer):
            bias = None if context.bias is None else context.bias[rows]
            probs_BMS = _scores(q_BMA[rows], cached_BSA, bias, self.heads).softmax(-1)
            parts.append(torch.bmm(probs_BMS, cached_BSA[..., : self.latent]))
        mean = torch.cat(parts).view(batch * tokens, self.heads, self.latent).transpose(0, 1)
        out = torch.bmm(mean, w_value.transpose(1, 2)).transpose(0, 1)
        return out.reshape(batch, tokens, self.heads * self.value)
