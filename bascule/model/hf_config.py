"""A model's `config.json` in Hugging Face's words: `deepseek_v3` (MLA), `qwen3` (GQA with q/k norm), `qwen2` (GQA with
biases on q, k and v), `llama` (GQA).

Newer transformers drops keys that other engines still need (`topk_method`, `scoring_func`, `rope_theta`, `torch_dtype`); we
write both spellings (inference.md 4.1). Whatever would make us compute something else than the folder means is refused, not
ignored. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bascule.config.model import ModelConfig
from bascule.errors import ModelFolderError

FAMILIES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}

_EVERY = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "attention_bias",
    "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
_GQA = ("num_key_value_heads", "head_dim")
_MLA = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor",
    "norm_topk_prob", "first_k_dense_replace",
)  # fmt: skip

_SCALED = {"factor", "original_max_position_embeddings"}
_YARN = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"}
_LLAMA3 = {"low_freq_factor", "high_freq_factor"}

# Keys whose other values mean another computation: (key, the only value we compute, what readers assume when it is absent).
_FIXED: dict[str, tuple[tuple[str, Any, Any], ...]] = {
    "deepseek_v3": (
        ("hidden_act", "silu", "silu"), ("topk_method", "noaux_tc", "noaux_tc"), ("scoring_func", "sigmoid", "sigmoid"),
        ("rope_interleave", True, True), ("moe_layer_freq", 1, 1),
    ),
    "qwen3": (("hidden_act", "silu", "silu"), ("use_sliding_window", False, False)),
    "qwen2": (("hidden_act", "silu", "silu"), ("use_sliding_window", False, False)),
    "llama": (("hidden_act", "silu", "silu"), ("mlp_bias", False, False)),
}  # fmt: skip


def family(config: ModelConfig) -> str:
    """The Hugging Face family that computes what this configuration computes.

    Raises ModelFolderError for a combination that no family of ours covers (GQA with experts).
    """
    if config.num_nextn_predict_layers and (config.attention, config.ffn) != ("mla", "moe"):
        raise ModelFolderError(
            f"A model with a prediction layer, attention '{config.attention}' and ffn '{config.ffn}' was to be written as a "
            "Hugging Face folder; readers build that layer with MLA and experts. Use those, or num_nextn_predict_layers = 0."
        )
    if config.attention == "mla":
        return "deepseek_v3"
    if config.ffn == "swiglu":
        qkv_only = config.attention_bias and not config.attention_output_bias
        return "qwen3" if config.qk_norm else "qwen2" if qkv_only else "llama"
    raise ModelFolderError(
        "A model with attention 'gqa' and ffn 'moe' was to be written as a Hugging Face folder; no family among "
        f"{', '.join(FAMILIES)} computes that. Use attention 'mla' with experts, or ffn 'swiglu' with 'gqa'."
    )


def to_hf(config: ModelConfig, *, dtype: str, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """The content of config.json. `dtype` as torch spells it ("float32"); `special_ids` holds bos/eos/pad_token_id."""
    kind = family(config)
    written: dict[str, Any] = {"architectures": [FAMILIES[kind]], "model_type": kind}
    written |= {name: getattr(config, name) for name in _EVERY}
    written |= {
        "rope_theta": config.rope_theta,
        **_rope_keys(config),
        "dtype": dtype,
        "torch_dtype": dtype,
        "attention_dropout": 0.0,
        "use_cache": True,
        "initializer_range": 0.02,
    }
    written |= {
        name: special_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    written |= {name: value for name, value, _ in _FIXED[kind]}
    if kind == "deepseek_v3":
        written |= _deepseek_keys(config)
    else:
        written |= {name: getattr(config, name) for name in _GQA}
    if kind in ("qwen2", "qwen3"):
        written |= {"sliding_window": None, "max_window_layers": config.num_hidden_layers}
    return written


def _rope_keys(config: ModelConfig) -> dict[str, Any]:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_scaling` beside `rope_theta` (everybody else)."""
    scaling = config.rope_scaling and config.rope_scaling.model_dump(exclude_none=True)
    if scaling:
        foreign = _YARN if scaling["rope_type"] == "llama3" else _LLAMA3
        scaling = {name: value for name, value in scaling.items() if name not in foreign}
    parameters = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    return {"rope_parameters": parameters, "rope_scaling": scaling}


def _deepseek_keys(config: ModelConfig) -> dict[str, Any]:
    """`num_key_value_heads` must equal the heads: readers split kv_b_proj by it. Without experts every layer is a dense one."""
    keys = {name: getattr(config, name) for name in _MLA}
    if config.ffn == "swiglu":
        keys["first_k_dense_replace"] = config.num_hidden_layers
    return keys | {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.qk_rope_head_dim,
        "qk_head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "pretraining_tp": 1,
        "ep_size": 1,
    }


def read_hf(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder. Raises ModelFolderError when it is missing or not JSON."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFolderError(
            f"'{folder}' was to be read as a model; it has no config.json. Give a Hugging Face folder with config.json and "
            "safetensors, for instance out/NAME/model."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(
            f"'{path}' is not readable JSON ({error}). Copy the folder again."
        ) from None
    if not isinstance(raw, dict):
        raise ModelFolderError(
            f"'{path}' holds a {type(raw).__name__}, not an object. Copy the folder again."
        )
    return raw


def from_hf(raw: Mapping[str, Any], *, source: str, mtp_layers: int = 0) -> ModelConfig:
    """The configuration a config.json means. `mtp_layers` is how many such layers the weights really hold: transformers
    writes `num_nextn_predict_layers: 1` and drops the layer.

    Raises ModelFolderError for another family, or for a key that asks for a computation that bascule does not have.
    """
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ModelFolderError(
            f"'{source}' has model_type {kind!r}; bascule reads {', '.join(FAMILIES)}. "
            "Convert the model, or choose one of these families."
        )
    for name, allowed, absent in _FIXED[kind]:
        _demand(source, name, raw.get(name, absent), allowed)
    _demand(source, "quantization_config", raw.get("quantization_config"), None)
    fields = {name: raw[name] for name in _EVERY if raw.get(name) is not None}
    fields |= _rope(raw, source)
    names = _MLA if kind == "deepseek_v3" else _GQA
    fields |= {
        name: raw[name]
        for name in names
        if name in raw and (raw[name] is not None or name == "q_lora_rank")
    }
    if kind == "deepseek_v3":
        dense = raw.get("first_k_dense_replace", 0) >= raw.get("num_hidden_layers", 0)
        fields |= {
            "attention": "mla",
            "ffn": "swiglu" if dense else "moe",
            "num_nextn_predict_layers": mtp_layers,
        }
        fields["num_key_value_heads"] = raw.get("num_attention_heads", 0)
    else:
        fields |= {"attention": "gqa", "ffn": "swiglu", "qk_norm": kind == "qwen3"}
        if (
            kind == "qwen2"
        ):  # its config.json does not say so: biases on queries, keys and values, always
            fields |= {"attention_bias": True, "attention_output_bias": False}
        fields.setdefault("num_key_value_heads", raw.get("num_attention_heads", 0))
        fields.setdefault(
            "head_dim", raw.get("hidden_size", 0) // max(1, raw.get("num_attention_heads", 1))
        )
    return _checked(fields, raw, names, source)


def _checked(
    fields: dict[str, Any], raw: Mapping[str, Any], names: tuple[str, ...], source: str
) -> ModelConfig:
    """Demand every shape-giving key (a default would load as another model), then let ModelConfig check the combination."""
    optional = {"attention_bias", "rms_norm_eps", "tie_word_embeddings", "q_lora_rank"}
    missing = [name for name in (*_EVERY, *names) if name not in fields and name not in optional]
    if missing:
        raise ModelFolderError(
            f"'{source}' was to give a {raw['model_type']} model; its config.json lacks {', '.join(missing)}. "
            "Copy the whole folder again, or add the keys."
        )
    fields.setdefault(
        "tie_word_embeddings", False
    )  # every family's default in transformers; ours differs
    try:
        return ModelConfig.model_validate({"preset": "custom", **fields})
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise ModelFolderError(
            f"'{source}' has a config.json that bascule's decoder cannot be: {reasons}."
        ) from None


def _demand(source: str, name: str, found: Any, allowed: Any) -> None:
    if found != allowed:
        raise ModelFolderError(
            f"'{source}' has {name} = {found!r}; bascule's decoder computes only {name} = {allowed!r}. Convert the model first."
        )


def _rope(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """transformers 5 keeps theta and scaling in `rope_parameters`; older files have theta at the top and `rope_scaling`."""
    holders = [dict(raw[name]) for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    kinds = {holder.get("rope_type", holder.get("type", "default")) for holder in holders}
    given = {name: value for holder in holders for name, value in holder.items() if value is not None}  # fmt: skip
    theta = float(given.get("rope_theta", raw.get("rope_theta", 10000.0)))
    if kinds <= {"default"}:
        return {"rope_theta": theta}
    kind = kinds.pop() if len(kinds) == 1 else None
    known = _SCALED | {"yarn": _YARN, "llama3": _LLAMA3}.get(str(kind), set())
    scaling = {n: v for n, v in given.items() if n not in ("rope_theta", "rope_type", "type")}
    if kind == "yarn" and "factor" not in scaling and "original_max_position_embeddings" in scaling:
        stretch = raw["max_position_embeddings"] / scaling["original_max_position_embeddings"]
        scaling["factor"] = stretch
    if kind not in ("yarn", "llama3") or set(scaling) - known or not set(scaling) >= _SCALED:
        raise ModelFolderError(
            f"'{source}' scales its rotary frequencies by {holders}; bascule's decoder computes yarn and llama3, with `factor` and "
            "`original_max_position_embeddings` and no keys beside transformers' own. Convert the model first."
        )
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **scaling}}
