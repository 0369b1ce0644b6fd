"""Write a model as a GGUF file in fp32, which llama.cpp runs: llama, qwen2, qwen3, and `deepseek2` for latent attention.

llama.cpp's own converter refuses every tokenizer it has not been told about, so we write the file ourselves through the `gguf` package.
Names and rearrangements are those of its converter (conversion/llama.py, conversion/deepseek.py): rows of q and k of "llama" turn in
neighbouring pairs, `kv_b_proj` is parted into keys (transposed) and values, experts are stacked, prediction layers are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bascule.config.model import ModelConfig
from bascule.errors import ModelFolderError, UsageError
from bascule.model import hf_config
from bascule.model.gguf import BLOCK, TOP
from bascule.model.transformer import Transformer

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "deepseek_v3": "deepseek2"}

_LATENT = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_NAMES = {ours: theirs for theirs, ours in BLOCK.items()} | _LATENT
_TOP = {ours: theirs for theirs, ours in TOP.items()}

Named = Iterator[tuple[str, NDArray[np.float32]]]


def write(
    path: Path,
    model: Transformer,
    config: ModelConfig,
    add_vocabulary: Callable[[Any], None],
    *,
    name: str,
) -> None:
    """`add_vocabulary(writer)` adds the tokenizer. Raises UsageError without the gguf package, ModelFolderError for what llama.cpp
    cannot hold."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UsageError(
            "A GGUF file was asked for, and the package gguf is not installed. Install it: pip install 'bascule[gguf]'."
        ) from None
    family = hf_config.family(config)
    if config.rope_scaling:
        raise ModelFolderError(
            f"A model whose rotary frequencies are scaled ({config.rope_scaling.rope_type}) was to be written as GGUF; bascule writes "
            "plain ones only. Convert its Hugging Face folder with llama.cpp's convert_hf_to_gguf.py."
        )
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    writer.add_name(name)
    _add_sizes(writer, config)
    if family == "deepseek_v3":
        _add_latent_sizes(writer, config, gguf.ExpertGatingFuncType.SIGMOID)
    add_vocabulary(writer)
    for theirs, values in tensors(model, config, turned=family == "llama"):
        writer.add_tensor(theirs, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: ModelConfig) -> None:
    latent = config.attention == "mla"
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if latent else config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.qk_rope_head_dim if latent else config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)  # all fp32
    if not latent:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _add_latent_sizes(writer: Any, config: ModelConfig, sigmoid: Any) -> None:
    """llama.cpp demands `q_lora_rank` even of models without one; 0 makes it look for a plain `attn_q` (its deepseek2.cpp)."""
    if config.ffn != "moe":
        raise ModelFolderError(
            "A model with latent attention and no experts was to be written as GGUF; llama.cpp's deepseek2 needs experts. "
            "Use the Hugging Face folder."
        )
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + rope)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(sigmoid)
    if config.n_group > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def tensors(model: Transformer, config: ModelConfig, *, turned: bool) -> Named:
    """Every tensor under llama.cpp's name, prediction layers left out."""
    for name, tensor in model.state_dict().items():
        values = tensor.detach().float().cpu().numpy()
        if name in _TOP:
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                yield _TOP[name], values
        elif name.startswith("model.layers."):
            _, _, number, inside = name.split(".", 3)
            for theirs, part in _of_block(inside, values, config, turned):
                yield f"blk.{number}.{theirs}", part


def _of_block(inside: str, values: NDArray[np.float32], config: ModelConfig, turned: bool) -> Named:
    stem, _, kind = inside.rpartition(".")
    if stem == "mlp.experts":  # stacked already: gate and up share a tensor
        if kind == "down_proj":
            yield "ffn_down_exps.weight", values
        else:
            gate, up = np.split(values, 2, axis=1)
            yield "ffn_gate_exps.weight", gate
            yield "ffn_up_exps.weight", up
    elif kind == "e_score_correction_bias":
        yield "exp_probs_b.bias", values
    elif stem == "self_attn.kv_b_proj":
        heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values_ = np.split(heads, [config.qk_nope_head_dim], axis=1)
        yield "attn_k_b.weight", keys.swapaxes(1, 2)
        yield "attn_v_b.weight", values_
    else:
        if turned and stem.endswith("q_proj"):
            values = _turn(values, config.num_attention_heads)
        elif turned and stem.endswith("k_proj"):
            values = _turn(values, config.num_key_value_heads)
        yield f"{_NAMES[stem]}.{kind}", values


def _turn(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from halves (x0,x1..,y0,y1..) to neighbouring pairs (x0,y0,x1,y1..): the inverse of gguf.py's."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
