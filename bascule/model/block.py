"""One decoder block, and the prediction layer that wraps one (multi-token prediction, DeepSeek-V3 section 2.2).

B rows, T tokens, D hidden, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bascule.config.model import ModelConfig
from bascule.model.attention import GroupedQueryAttention, LatentAttention
from bascule.model.cache import Context
from bascule.model.layers import RMSNorm, SwiGLU
from bascule.model.moe import MoE


class BlockOutput(NamedTuple):
    x_BTD: Tensor
    loads_E: Tensor | None


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed-forward(norm(x)). `slot` is the block's place in the cache."""

    def __init__(self, config: ModelConfig, slot: int, *, experts: bool) -> None:
        super().__init__()
        attention = LatentAttention if config.attention == "mla" else GroupedQueryAttention
        self.self_attn = attention(config, slot)
        self.mlp = MoE(config) if experts else SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, context: Context, mask_BT: Tensor | None) -> BlockOutput:
        attended = self.self_attn(self.input_layernorm(x_BTD), context)
        x_BTD, normed = self.post_attention_layernorm.after_adding(x_BTD, attended)
        if isinstance(self.mlp, MoE):
            out, loads_E = self.mlp(normed, mask_BT)
            return BlockOutput(x_BTD + out, loads_E)
        return BlockOutput(x_BTD + self.mlp(normed), None)


class PredictionLayer(nn.Module):
    """Looks one token further: from the trunk's normed hidden state of token t and the embedding of token t+1 it makes the
    hidden state that predicts token t+2, through the trunk's own head. A block with experts whenever the model has any."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, 0, experts=config.ffn == "moe")
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_BTD: Tensor, embedded_BTD: Tensor, context: Context, mask_BT: Tensor | None
    ) -> BlockOutput:
        """`embedded_BTD` holds the token after each hidden state. The order [embedding; hidden] is the checkpoints'."""
        both_BTD = torch.cat([self.enorm(embedded_BTD), self.hnorm(hidden_BTD)], -1)
        x_BTD = self.eh_proj(both_BTD).to(hidden_BTD.dtype)
        x_BTD, loads_E = self.block(x_BTD, context, mask_BT)
        return BlockOutput(self.norm(x_BTD), loads_E)
