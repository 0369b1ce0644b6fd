"""A model as the planner sees it: sizes in, parameters, FLOPs and cache bytes out. Torch-free, exact from the architecture.

Built from a recipe's `ModelConfig`, a Hugging Face `config.json`, or a row of a table in the format of runs.csv. Counts follow
planner.md section 7: a token costs `6 * matmul weights used + 3 * attention forward`; embedding look-ups are free.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from bascule.config import PRESETS, ModelConfig
from bascule.errors import RecipeError, nearest


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention's sizes. `q_lora` None: queries are projected directly."""

    q_lora: int | None
    kv_lora: int
    nope: int
    rope: int
    v: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One decoder-only model. Widths count elements; `shared_ffn` is the summed width of all shared experts.

    `dense_layers` use a dense feed-forward of width `ffn`, the others `topk` of `experts` of width `moe_ffn`.
    `local_layers` of the layers see only `window` tokens back. `gated`: three feed-forward matrices instead of two.
    `node_limit`: groups of experts that one token may reach (0: no limit).
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    latent: Latent | None = None
    experts: int = 0
    topk: int = 0
    moe_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    mtp_layers: int = 0
    window: int = 0
    local_layers: int = 0
    node_limit: int = 0

    @cached_property
    def moe(self) -> bool:
        return self.experts > 0

    @cached_property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.moe else 0

    @cached_property
    def attention_weights(self) -> int:
        """Matmul weights of one layer's attention."""
        h = self.hidden
        if self.latent is None:
            return h * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        m = self.latent
        query = (
            h * m.q_lora + m.q_lora * self.heads * (m.nope + m.rope)
            if m.q_lora
            else h * self.heads * (m.nope + m.rope)
        )
        latent = h * (m.kv_lora + m.rope) + m.kv_lora * self.heads * (m.nope + m.v)
        return query + latent + self.heads * m.v * h

    @cached_property
    def dense_ffn_weights(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @cached_property
    def expert_weights(self) -> int:
        """Matmul weights of one routed expert."""
        return (3 if self.gated else 2) * self.hidden * self.moe_ffn

    @cached_property
    def shared_weights(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.shared_ffn

    @cached_property
    def router_weights(self) -> int:
        return self.hidden * self.experts

    @cached_property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    def layer_weights(self, *, active: bool, moe: bool) -> int:
        """Matmul weights of one layer; `active`: only those one token uses."""
        if not moe:
            return self.attention_weights + self.dense_ffn_weights
        routed = (self.topk if active else self.experts) * self.expert_weights
        return self.attention_weights + routed + self.shared_weights + self.router_weights

    @cached_property
    def mtp_weights(self) -> int:
        """Active matmul weights of one multi-token-prediction module, its projection and use of the head included."""
        return (
            self.layer_weights(active=True, moe=self.moe) + 2 * self.hidden**2 + self.head_weights
        )

    @cached_property
    def parameters(self) -> int:
        """Weights held in memory, embeddings included; norms and biases (under 0.1 %) left out."""
        body = self.moe_layers * self.layer_weights(active=False, moe=True)
        body += (self.layers - self.moe_layers) * self.layer_weights(active=False, moe=False)
        mtp = self.mtp_layers * (
            self.layer_weights(active=False, moe=self.moe) + 2 * self.hidden**2
        )
        return body + mtp + self.head_weights * (1 if self.tied else 2)

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters that expert parallelism divides."""
        return (
            (self.moe_layers + (self.mtp_layers if self.moe else 0))
            * self.experts
            * self.expert_weights
        )

    @cached_property
    def active_weights(self) -> int:
        """Matmul weights one trained token uses in all, head and MTP included."""
        body = self.moe_layers * self.layer_weights(active=True, moe=True)
        body += (self.layers - self.moe_layers) * self.layer_weights(active=True, moe=False)
        return body + self.head_weights + self.mtp_layers * self.mtp_weights

    def attention_flops(self, sequence: int, *, saved: float = 1.0) -> float:
        """Forward score and value FLOPs of one token in all layers, causal, averaged over a sequence of this length.

        `saved`: share of what a window could save that is saved (kernels skip whole blocks only, some none).
        """
        widths = (
            2 * self.head_dim
            if self.latent is None
            else self.latent.nope + self.latent.rope + self.latent.v
        )
        full = sequence / 2
        near = (
            full
            if self.window <= 0 or self.window >= sequence
            else self.window - self.window**2 / (2 * sequence)
        )
        near = full - saved * (full - near)
        layers = self.layers + self.mtp_layers
        return (
            2
            * self.heads
            * widths
            * (self.local_layers * near + (layers - self.local_layers) * full)
        )

    def train_flops(self, sequence: int) -> float:
        """Model FLOPs of one trained token: forward and backward, recomputation not counted."""
        return 6 * self.active_weights + 3 * self.attention_flops(sequence)

    def cache_bytes(self, *, element_bytes: float = 2) -> float:
        """Key-value (or latent) cache of one token over all layers."""
        width = (
            2 * self.kv_heads * self.head_dim
            if self.latent is None
            else self.latent.kv_lora + self.latent.rope
        )
        return width * self.layers * element_bytes


def from_config(config: ModelConfig, *, name: str | None = None) -> Shape:
    """The recipe's model."""
    moe = config.ffn == "moe"
    mla = config.attention == "mla"
    latent = Latent(
        q_lora=config.q_lora_rank,
        kv_lora=config.kv_lora_rank,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        v=config.v_head_dim,
    )
    return Shape(
        name=name or config.preset,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        latent=latent if mla else None,
        experts=config.n_routed_experts if moe else 0,
        topk=config.num_experts_per_tok if moe else 0,
        moe_ffn=config.moe_intermediate_size if moe else 0,
        shared_ffn=config.n_shared_experts * config.moe_intermediate_size if moe else 0,
        dense_layers=min(config.first_k_dense_replace, config.num_hidden_layers)
        if moe
        else config.num_hidden_layers,
        mtp_layers=config.num_nextn_predict_layers,
        node_limit=config.topk_group if moe and config.n_group > 1 else 0,
    )


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
