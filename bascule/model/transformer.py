"""The decoder: one stack of blocks, two attentions, two feed-forwards. Tensors in, tensors out; it never asks which chip.

The module tree carries Hugging Face's names (`model.layers.0.self_attn...`), so that loading and saving are renames; only the
experts differ (stacked here, one by one on disk). A forward call changes no parameter and no buffer; it writes to the cache
it is given. B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bascule.config import ModelConfig
from bascule.model.attention import (
    GroupedQueryAttention,
    LatentAttention,
    cached_bias,
    padding_bias,
)
from bascule.model.cache import Cache, Context, KVCache, LatentCache
from bascule.model.layers import RMSNorm, Rotary, SwiGLU
from bascule.model.moe import MoE


@dataclass(frozen=True)
class Output:
    """`logits_BTV` fp32. `expert_loads` [MoE layers, experts] int64, tokens that chose each expert; None without experts."""

    logits_BTV: Tensor
    expert_loads: Tensor | None


class BlockOutput(NamedTuple):
    x_BTD: Tensor
    loads_E: Tensor | None


def is_moe_layer(config: ModelConfig, layer: int) -> bool:
    return config.ffn == "moe" and layer >= config.first_k_dense_replace


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention = LatentAttention if config.attention == "mla" else GroupedQueryAttention
        self.self_attn = attention(config, layer)
        self.mlp = (
            MoE(config)
            if is_moe_layer(config, layer)
            else SwiGLU(config.hidden_size, config.intermediate_size)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, context: Context, mask_BT: Tensor | None) -> BlockOutput:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context)
        normed = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            out, loads_E = self.mlp(normed, mask_BT)
            return BlockOutput(x_BTD + out, loads_E)
        return BlockOutput(x_BTD + self.mlp(normed), None)


class Decoder(nn.Module):
    """Embedding, blocks, last norm. `layers.N` beyond `num_hidden_layers` does not exist here (see transformer `mtp`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        mla = config.attention == "mla"
        self.rotary = Rotary(
            config.qk_rope_head_dim if mla else config.head_dim, config.max_position_embeddings, config.rope_theta,
            "neighbours" if mla else "halves",
        )  # fmt: skip


class Transformer(nn.Module):
    """A causal language model. Parameters are uninitialised until `weights.initialise` or `weights.load_hf` fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.retie()

    def retie(self) -> None:
        """Make head and embedding one parameter again where the config says so; moving to some devices parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Transformer:
        """`.to` on a private-use device (npu) silently unties weights (feasibility.md 2); tie them again after every move."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.retie()
        return self

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        at_B: Tensor | None = None,
    ) -> Output:
        """Logits of the next token after every token.

        `mask` [B, T] is true for real tokens (attention.py); not needed for right-padded training batches. With `cache`, T tokens
        are appended to every row, or as many as `mask` says are real: real ones first. `positions_BT` overrides the rotary
        positions. `at_B` asks for the logits after one token of each row only (index into T): logits are then [B, 1, V].
        Raises ValueError when a position exceeds `max_position_embeddings`.
        """
        context = self._context(tokens_BT, positions_BT, mask, cache)
        x_BTD = self.model.embed_tokens(tokens_BT)
        loads = []
        for block in self.model.layers:
            x_BTD, loads_E = block(x_BTD, context, mask)
            if loads_E is not None:
                loads.append(loads_E)
        if cache is not None:
            cache.close(tokens_BT.shape[1] if mask is None else mask.sum(1))
        if at_B is not None:
            x_BTD = x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), at_B].unsqueeze(1)
        logits_BTV = F.linear(self.model.norm(x_BTD), self.lm_head.weight).float()
        return Output(logits_BTV, torch.stack(loads) if loads else None)

    def _context(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Context:
        tokens, rotary, dtype = tokens_BT.shape[1], self.model.rotary, self.lm_head.weight.dtype
        reach = tokens + (0 if cache is None else cache.longest)
        if reach > self.config.max_position_embeddings:
            raise ValueError(
                f"Asked for {reach} positions; the model has max_position_embeddings={self.config.max_position_embeddings}. "
                "Shorten the sequence or raise it in the recipe."
            )
        if cache is None:
            cos, sin = rotary.prefix(tokens) if positions_BT is None else rotary(positions_BT)
            return Context(cos, sin, None if mask is None else padding_bias(mask, dtype))
        read = cache.longest > 0
        slots_BT = cache.open(tokens, ragged=mask is not None)
        cos, sin = rotary(slots_BT if positions_BT is None else positions_BT)
        masked = read and (cache.ragged or tokens > 1)
        return Context(
            cos, sin, cached_bias(slots_BT, cache.longest, dtype) if masked else None, cache, read
        )

    def new_cache(self, batch: int, length: int, device: torch.device | str | None = None) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens, on the model's device unless another is named."""
        weight = self.lm_head.weight
        kind = LatentCache if self.config.attention == "mla" else KVCache
        return kind.empty(
            self.config, batch, length, torch.device(device or weight.device), weight.dtype
        )

    def moe_layers(self) -> list[MoE]:
        return [
            block.mlp
            for block in self.model.layers
            if isinstance(block, Block) and isinstance(block.mlp, MoE)
        ]

    def update_router_bias(self, expert_loads: Tensor, speed: float) -> None:
        """One balancing step for every MoE layer; `expert_loads` as in Output. Exact and free of any random choice."""
        for moe, loads_E in zip(self.moe_layers(), expert_loads, strict=True):
            moe.gate.update_bias(loads_E, speed)
