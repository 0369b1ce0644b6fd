"""Models by name, by a Hugging Face `config.json`, or by a TOML table of sizes, read into a `Shape`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bascule.config import PRESETS, ModelConfig
from bascule.errors import RecipeError, nearest
from bascule.plan.architecture import Latent, Shape, from_config


def from_hugging_face(raw: Mapping[str, Any], *, name: str) -> Shape:
    """A `config.json` of a decoder-only model. Raises RecipeError naming the key that is missing."""
    text = raw.get("text_config", raw)
    try:
        heads = int(text["num_attention_heads"])
        experts = int(
            text.get("n_routed_experts")
            or text.get("num_local_experts")
            or text.get("num_experts")
            or 0
        )
        hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
        ffn = int(text.get("intermediate_size") or text["moe_intermediate_size"])
        moe_ffn = int(text.get("moe_intermediate_size") or ffn) if experts else 0
        latent = None
        if text.get("kv_lora_rank"):
            latent = Latent(
                q_lora=text.get("q_lora_rank"),
                kv_lora=int(text["kv_lora_rank"]),
                nope=int(text["qk_nope_head_dim"]),
                rope=int(text["qk_rope_head_dim"]),
                v=int(text["v_head_dim"]),
            )
        return Shape(
            name=name,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or hidden // heads),
            ffn=ffn,
            vocab=int(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", False)),
            latent=latent,
            experts=experts,
            topk=int(text.get("num_experts_per_tok") or 0) if experts else 0,
            moe_ffn=moe_ffn,
            shared_ffn=_shared_width(text, moe_ffn) if experts else 0,
            dense_layers=int(text.get("first_k_dense_replace") or 0) if experts else layers,
            mtp_layers=int(text.get("num_nextn_predict_layers") or 0),
            node_limit=int(text.get("topk_group") or 0) if int(text.get("n_group") or 1) > 1 else 0,
            window=int(text.get("sliding_window") or 0)
            if text.get("use_sliding_window", True)
            else 0,
            local_layers=sum(kind == "sliding_attention" for kind in text.get("layer_types") or ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"The model configuration '{name}' lacks or garbles {error}. Give a decoder's Hugging Face config.json."
        ) from None


def _shared_width(text: Mapping[str, Any], moe_ffn: int) -> int:
    explicit = text.get("shared_expert_intermediate_size")
    return int(explicit) if explicit else int(text.get("n_shared_experts") or 0) * moe_ffn


def _dense(
    name: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    head_dim: int = 128,
) -> Shape:
    return Shape(name=name, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn, vocab=vocab, dense_layers=layers)  # fmt: skip


# Public shapes by their common names, from each model's own config.json. DeepSeek-V3 is the recipe preset `v3`.
NAMED: dict[str, Shape] = {
    "llama-3.1-8b": _dense("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128256),
    "llama-3.1-70b": _dense("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128256),
    "llama-3.1-405b": _dense("llama-3.1-405b", 126, 16384, 53248, 128, 8, 128256),
    "qwen3-8b": _dense("qwen3-8b", 36, 4096, 12288, 32, 8, 151936),
    "qwen3-30b-a3b": Shape(
        name="qwen3-30b-a3b",
        hidden=2048,
        layers=48,
        heads=32,
        kv_heads=4,
        head_dim=128,
        ffn=6144,
        vocab=151936,
        experts=128,
        topk=8,
        moe_ffn=768,
    ),  # fmt: skip
    "qwen3-235b-a22b": Shape(
        name="qwen3-235b-a22b",
        hidden=4096,
        layers=94,
        heads=64,
        kv_heads=4,
        head_dim=128,
        ffn=12288,
        vocab=151936,
        experts=128,
        topk=8,
        moe_ffn=1536,
    ),  # fmt: skip
}
ALIASES = {
    "deepseek-v3": "v3",
    "deepseek-r1": "v3",
    "deepseek-r2": "v3",
    "llama-3-8b": "llama-3.1-8b",
    "llama-3-70b": "llama-3.1-70b",
}


def model_named(name: str) -> Shape:
    """A preset, a public model's name, or the path of a `config.json` or a TOML table. Raises RecipeError with the nearest name."""
    if name.endswith(".json"):
        return _read(Path(name))
    if name.endswith(".toml"):
        return from_table(Path(name))
    key = ALIASES.get(name.lower(), name.lower())
    if key in NAMED:
        return NAMED[key]
    if key in PRESETS:
        return from_config(ModelConfig.model_validate({"preset": key}), name=name)
    known = [*PRESETS, *NAMED, *ALIASES]
    raise RecipeError(
        f"'{name}' is not a model the planner knows; known: {', '.join(known)}, or a path to a config.json or a TOML table.{nearest(key, known)}"
    )


def from_table(path: Path) -> Shape:
    """A TOML table whose keys are `Shape`'s (and a `latent` table with `Latent`'s). Raises RecipeError naming a wrong key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"The model table '{path}' cannot be read ({error}).") from None
    allowed = [f.name for f in fields(Shape)]
    for key in table:
        if key not in allowed:
            raise RecipeError(
                f"{path}: {key}: unknown key; allowed: {', '.join(allowed)}.{nearest(key, allowed)}"
            )
    table.setdefault("name", path.stem)
    table.setdefault("kv_heads", table.get("heads"))
    table.setdefault("dense_layers", 0 if table.get("experts") else table.get("layers"))
    try:
        latent = Latent(**table.pop("latent")) if "latent" in table else None
        return Shape(latent=latent, **table)
    except TypeError as error:
        raise RecipeError(
            f"{path}: {str(error).replace('Shape.__init__() ', '')}. A table needs at least hidden, layers, heads, head_dim, ffn and vocab."
        ) from None


def _read(path: Path) -> Shape:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(f"The model configuration '{path}' cannot be read ({error}).") from None
    return from_hugging_face(raw, name=path.parent.name or path.stem)
