"""A Hugging Face `config.json` read into a `Shape`. Families spell the same size differently; the spellings stand in one table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bascule.errors import RecipeError
from bascule.plan.architecture import Latent, Shape

SPELLINGS = {
    "hidden": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "ffn": ("intermediate_size_mlp", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "topk": ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k"),
}
UNGATED = ("gpt2", "gpt_neo", "gptj", "gpt_bigcode", "bloom", "opt", "falcon", "mpt", "starcoder2", "nemotron", "arcee", "apertus",
           "persimmon", "codegen", "phi-")  # fmt: skip
# Families whose embedding is the head unless the file says otherwise.
TIED = ("gpt2", "bloom", "opt", "falcon", "mpt", "gemma", "cohere")
EVERY_SECOND = ("gemma2", "gpt_oss", "cohere2")  # families whose windows alternate without a list
WINDOWED_FAMILIES = ("mistral", "starcoder2", "phi3")  # a window, when given, holds in every layer
LINEAR_STATE = 128  # positions' worth of cache that a linear-attention layer's state takes
# Layers that do other work than the planner counts, told by a key of the file or by the family: counted as attention their
# parameters would be off by a quarter to several times.
UNCOUNTED = re.compile(r"mamba_|n_mamba|ssm_|state_size$|lru_width$|conv_L_cache$|altup_")
UNCOUNTED_FAMILIES = ("rwkv", "longcat_flash", "jetmoe", "kimi_linear", "dbrx")
UNCOUNTED_KINDS = re.compile(r"mamba|conv|recurrent")
ENCODER_FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "albert", "deberta", "modernbert", "xlnet", "t5")  # fmt: skip


def from_hugging_face(raw: Mapping[str, Any], *, name: str) -> Shape:
    """A `config.json` of a decoder-only model. Raises RecipeError naming the key that is missing."""
    text = raw.get("text_config") or raw.get("llm_config") or raw
    try:
        family = str(text.get("model_type") or raw.get("model_type") or "")
        if reason := _uncounted(text, family):
            raise RecipeError(
                f"The model configuration '{name}' has {reason}, which the planner does not count; give a decoder whose layers attend, or the sizes of one alike as a TOML table."
            )
        return _shape(text, family, name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"The model configuration '{name}' lacks or garbles {error}. Give a decoder's Hugging Face config.json."
        ) from None


def _uncounted(text: Mapping[str, Any], family: str) -> str:
    """What of this model no `Shape` can say; empty where nothing is known to be missing."""
    if key := next((key for key, value in text.items() if UNCOUNTED.search(key) and value), ""):
        return f"layers of another kind ({key})"
    if family in UNCOUNTED_FAMILIES:
        return f"layers of another kind ({family})"
    listed = [*(text.get("layer_types") or ()), *(text.get("layers_block_type") or ())]
    if kind := next((str(kind) for kind in listed if UNCOUNTED_KINDS.search(str(kind))), ""):
        return f"layers of another kind ({kind})"
    named = " ".join(map(str, text.get("architectures") or ()))
    if text.get("is_encoder_decoder") or family in ENCODER_FAMILIES or "ForMaskedLM" in named:
        return "an encoder"
    return ""


def _shape(text: Mapping[str, Any], family: str, name: str) -> Shape:
    hidden, layers, heads = (_size(text, key) for key in ("hidden", "layers", "heads"))
    experts = _size(text, "experts", 0) if text.get("is_moe", True) else 0
    shared_key = text.get("multi_query") and not text.get("new_decoder_architecture")
    ffn = _size(text, "ffn", 4 * hidden)
    moe_ffn = int(text.get("moe_intermediate_size") or text.get("intermediate_size") or ffn)
    local, window = _windows(text, family, layers)
    return Shape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=1 if shared_key else _size(text, "kv_heads", heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        ffn=ffn,
        vocab=int(text["vocab_size"]),
        gated=not f"{family}-".startswith(UNGATED),
        tied=bool(text.get("tie_word_embeddings", family.startswith(TIED))),
        latent=_latent(text),
        experts=experts,
        topk=_size(text, "topk") if experts else 0,
        moe_ffn=moe_ffn if experts else 0,
        shared_ffn=_shared_width(text, family, moe_ffn) if experts else 0,
        dense_layers=_dense_layers(text, layers) if experts else layers,
        mtp_layers=int(text.get("num_nextn_predict_layers") or 0),
        node_limit=int(text.get("topk_group") or 0) if int(text.get("n_group") or 1) > 1 else 0,
        window=window,
        local_layers=local,
        selected=int(text.get("index_topk") or 0),
        index_width=int(text.get("index_n_heads") or 0) * int(text.get("index_head_dim") or 128),
    )


def _size(text: Mapping[str, Any], key: str, default: int | None = None) -> int:
    for spelling in SPELLINGS[key]:
        if (value := text.get(spelling)) is not None:
            if isinstance(value, (list, dict)):
                raise ValueError(f"{spelling} = {value!r:.40}, one number was expected")
            return int(value)
    if default is None:
        raise KeyError(SPELLINGS[key][0])
    return default


def _latent(text: Mapping[str, Any]) -> Latent | None:
    if not text.get("kv_lora_rank"):
        return None
    return Latent(
        q_lora=text.get("q_lora_rank"),
        kv_lora=int(text["kv_lora_rank"]),
        nope=int(text["qk_nope_head_dim"]),
        rope=int(text["qk_rope_head_dim"]),
        v=int(text["v_head_dim"]),
    )


def _shared_width(text: Mapping[str, Any], family: str, moe_ffn: int) -> int:
    explicit = text.get("shared_expert_intermediate_size") or text.get("shared_intermediate_size")
    if family.startswith("llama4"):  # one shared expert, which its config does not mention
        return moe_ffn
    return int(explicit) if explicit else int(text.get("n_shared_experts") or 0) * moe_ffn


def _dense_layers(text: Mapping[str, Any], layers: int) -> int:
    """Layers without experts: the first ones, those listed, or all but every second (third, ...) one."""
    every = int(text.get("interleave_moe_layer_step") or text.get("decoder_sparse_step") or 1)
    listed = len(text.get("mlp_only_layers") or ())
    return max(
        int(text.get("first_k_dense_replace") or 0), listed, layers - layers // max(1, every)
    )


def _windows(text: Mapping[str, Any], family: str, layers: int) -> tuple[int, int]:
    """(layers that see a window only, window in positions); linear attention counts as a window as wide as its state."""
    kinds = [str(kind) for kind in text.get("layer_types") or ()]
    if linear := kinds.count("linear_attention") or _unlisted_linear(text, layers):
        return linear, LINEAR_STATE
    chunk = text.get("attention_chunk_size") if family.startswith("llama4") else None
    window = int(text.get("sliding_window") or chunk or 0)
    if not window or not text.get("use_sliding_window", True):
        return 0, 0
    if kinds:
        return sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds), window
    if chunk:  # every fourth layer sees all unless the file lists them
        listed = text.get("no_rope_layers") or ()
        return (sum(map(bool, listed)) if listed else layers - layers // 4), window
    if isinstance(marks := text.get("sliding_window_pattern"), str):  # EXAONE's `LLLG`
        return sum(marks[at % len(marks)] == "L" for at in range(layers)), window
    if pattern := int(text.get("sliding_window_pattern") or (2 if family.startswith(EVERY_SECOND) else 6 if family.startswith("gemma3") else 0)):  # fmt: skip
        return layers - layers // pattern, window
    return (layers if family.startswith(WINDOWED_FAMILIES) else 0), window


def _unlisted_linear(text: Mapping[str, Any], layers: int) -> int:
    """Layers of linear attention where no `layer_types` lists them: Qwen3-Next attends in every fourth only, MiniMax-01 marks each."""
    if interval := int(text.get("full_attention_interval") or 0):
        return layers - layers // interval
    return list(text.get("attn_type_list") or ()).count(0)
