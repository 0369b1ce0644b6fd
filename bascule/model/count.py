"""Exact parameter, FLOP and byte counts of a configuration, without building it and without torch.

A multiply-add is two FLOPs; backward is twice forward. Counted are the matrix products (linear layers, attention, router,
head); norms, softmax, rotary and the embedding's look-up are left out, as in the model-FLOPs formula everyone compares with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bascule.config.model import ModelConfig

KEPT_LOGITS_BYTES = 256 * 2**20
"""fp32 logits of a training step up to this size are kept for the backward pass; more are worked out in chunks, and once more in the
backward pass, which costs a third of the head's products (model/head.py)."""
LOGITS_CHUNK_BYTES = 32 * 2**20  # at most three such blocks live together


@dataclass(frozen=True)
class Matrix:
    """`copies` weight matrices of `rows` x `columns`, `active` of which one token passes."""

    name: str
    rows: int
    columns: int
    copies: int = 1
    active: int = 1

    @property
    def size(self) -> int:
        return self.rows * self.columns


def parameters(config: ModelConfig, *, mtp: bool = False) -> int:
    """Learned numbers. A tied head counts once; router biases are buffers, not counted. `mtp` adds the prediction layers
    without their copies of embedding and head (published sizes leave all of it out: 671B for DeepSeek-V3)."""
    total = _outside_blocks(config) + sum(
        _block(config, layer) for layer in range(config.num_hidden_layers)
    )
    return total + (config.num_nextn_predict_layers * _mtp_layer(config) if mtp else 0)


def active_parameters(config: ModelConfig) -> int:
    """Parameters one token passes: chosen and shared experts only. DeepSeek-V3: 37.6B, published as 37B."""
    idle = sum(matrix.size * (matrix.copies - matrix.active) for matrix in _all_matrices(config))
    return parameters(config) - idle


def forward_flops_per_token(config: ModelConfig, context: float) -> float:
    """FLOPs to work out one token's logits when it attends to `context` tokens, with expanded keys and values."""
    linear = (
        sum(matrix.size * matrix.active for matrix in _all_matrices(config))
        + config.vocab_size * config.hidden_size
    )
    return 2.0 * linear + 2.0 * config.num_hidden_layers * context * _attention_width(config)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward plus backward, three times forward; a causal token sees half the sequence on average."""
    return 3.0 * forward_flops_per_token(config, context=(seq_len + 1) / 2)


def decode_flops_per_token(config: ModelConfig, context: float) -> float:
    """FLOPs of one cached decode step. Absorbed MLA scores and averages the latent, which is wider than a head."""
    if config.attention == "gqa":
        return forward_flops_per_token(config, context)
    width = config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    return forward_flops_per_token(config, 0) + 2.0 * config.num_hidden_layers * context * width


def kv_cache_elements_per_token(config: ModelConfig) -> int:
    """Numbers remembered for one token, all layers: the latent and the shared rotary key, or keys and values."""
    if config.attention == "mla":
        return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    return kv_cache_elements_per_token(config) * bytes_per_element


def weight_bytes(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Size of the weights in memory; a tied head counts once."""
    return parameters(config) * bytes_per_element


def moe_layers(config: ModelConfig) -> int:
    """How many layers hold experts."""
    return sum(_has_experts(config, layer) for layer in range(config.num_hidden_layers))


def _has_experts(config: ModelConfig, layer: int) -> bool:
    return config.ffn == "moe" and layer >= config.first_k_dense_replace


def _outside_blocks(config: ModelConfig) -> int:
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size + config.hidden_size


def _block(config: ModelConfig, layer: int) -> int:
    matrices = sum(
        matrix.size * matrix.copies
        for matrix in _block_matrices(config, _has_experts(config, layer))
    )
    return matrices + 2 * config.hidden_size + _attention_vectors(config)


def _mtp_layer(config: ModelConfig) -> int:
    """One decoder block of the last layer's kind, the projection of [embedding; hidden], three norms."""
    last = max(config.num_hidden_layers, config.first_k_dense_replace)
    return _block(config, last) + 2 * config.hidden_size**2 + 3 * config.hidden_size


def _all_matrices(config: ModelConfig) -> Iterator[Matrix]:
    for layer in range(config.num_hidden_layers):
        yield from _block_matrices(config, _has_experts(config, layer))


def _block_matrices(config: ModelConfig, experts: bool) -> Iterator[Matrix]:
    yield from _latent_matrices(config) if config.attention == "mla" else _grouped_matrices(config)
    hidden = config.hidden_size
    if not experts:
        yield Matrix("mlp", 3 * hidden, config.intermediate_size)
        return
    size = config.moe_intermediate_size
    yield Matrix("router", config.n_routed_experts, hidden)
    yield Matrix("experts", 3 * hidden, size, config.n_routed_experts, config.num_experts_per_tok)
    yield Matrix("shared_experts", 3 * hidden, size * config.n_shared_experts)


def _latent_matrices(config: ModelConfig) -> Iterator[Matrix]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.q_lora_rank is None:
        yield Matrix("q_proj", queries, hidden)
    else:
        yield Matrix("q_a_proj", config.q_lora_rank, hidden)
        yield Matrix("q_b_proj", queries, config.q_lora_rank)
    yield Matrix("kv_a_proj_with_mqa", config.kv_lora_rank + config.qk_rope_head_dim, hidden)
    yield Matrix(
        "kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank
    )
    yield Matrix("o_proj", hidden, heads * config.v_head_dim)


def _grouped_matrices(config: ModelConfig) -> Iterator[Matrix]:
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    yield Matrix("q_proj", queries, hidden)
    yield Matrix("k_proj and v_proj", 2 * config.num_key_value_heads * config.head_dim, hidden)
    yield Matrix("o_proj", hidden, queries)


def _attention_vectors(config: ModelConfig) -> int:
    """Gains and biases of one attention."""
    if config.attention == "mla":
        gains = config.kv_lora_rank + (config.q_lora_rank or 0)
        biases = (
            config.kv_lora_rank
            + config.qk_rope_head_dim
            + (config.q_lora_rank or 0)
            + config.hidden_size
        )
    else:
        gains = 2 * config.head_dim if config.qk_norm else 0
        biases = config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads) + (
            config.hidden_size if config.attention_output_bias else 0
        )
    return gains + (biases if config.attention_bias else 0)


def _attention_width(config: ModelConfig) -> int:
    """Multiply-adds per context token and layer: scores over the key size, average over the value size, every head."""
    if config.attention == "mla":
        return config.num_attention_heads * (
            config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        )
    return config.num_attention_heads * 2 * config.head_dim
