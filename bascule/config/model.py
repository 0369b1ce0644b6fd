"""The section `[model]`: the architecture, its named shapes, and the one dial that derives a shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from bascule.config.section import Section
from bascule.errors import nearest


class RopeScaling(Section):
    """Rotary frequencies stretched for a longer context, in Hugging Face's words (model/rope.py computes them)."""

    rope_type: Literal["yarn", "llama3"]
    factor: float = Field(..., ge=1)
    original_max_position_embeddings: int = Field(..., ge=1)
    beta_fast: float = Field(32.0, gt=0, description="yarn")
    beta_slow: float = Field(1.0, gt=0, description="yarn")
    mscale: float | None = Field(None, description="yarn; DeepSeek's temperature of the tables")
    mscale_all_dim: float | None = Field(None, description="yarn; and of the scores")
    attention_factor: float | None = Field(None, gt=0, description="yarn; overrides mscale")
    truncate: bool = Field(True, description="yarn: the ramp begins and ends at whole indices")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3")


class ModelConfig(Section):
    """The architecture, under Hugging Face's own names so that export is a rename (issue part 1, item 4).

    Sizes count elements; `experts` fields matter only for `ffn = "moe"`, the `*_lora_rank` and `qk_*` fields only for MLA.
    With `from`, the sizes are those of the model found there; `bascule run` fills them in before anything else happens.
    """

    model_config = ConfigDict(populate_by_name=True)

    from_: str | None = Field(
        None,
        min_length=1,
        alias="from",
        description="start from an existing model: a Hugging Face folder (safetensors), or a GGUF file",
    )
    preset: str = Field(
        "nano", description="named shape to start from; any field below overrides it"
    )
    depth: int | None = Field(
        None,
        ge=1,
        le=128,
        description="one dial: every size that is not set follows from it (shape_of_depth)",
    )
    attention: Literal["mla", "gqa"] = "mla"
    ffn: Literal["moe", "swiglu"] = "moe"
    vocab_size: int = Field(128, ge=2, description="overwritten by the tokenizer's size in a run")
    hidden_size: int = Field(96, ge=8)
    num_hidden_layers: int = Field(3, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    num_key_value_heads: int = Field(4, ge=1)
    head_dim: int = Field(24, ge=2, description="GQA only")
    q_lora_rank: int | None = Field(None, ge=1)
    kv_lora_rank: int = Field(48, ge=1)
    qk_nope_head_dim: int = Field(16, ge=1)
    qk_rope_head_dim: int = Field(8, ge=2)
    v_head_dim: int = Field(24, ge=1)
    intermediate_size: int = Field(256, ge=8)
    moe_intermediate_size: int = Field(96, ge=8)
    n_routed_experts: int = Field(4, ge=1)
    n_shared_experts: int = Field(1, ge=1)
    num_experts_per_tok: int = Field(1, ge=1)
    n_group: int = Field(1, ge=1)
    topk_group: int = Field(1, ge=1)
    first_k_dense_replace: int = Field(1, ge=0)
    routed_scaling_factor: float = Field(1.0, gt=0)
    norm_topk_prob: bool = True
    qk_norm: bool = Field(False, description="RMS norm on queries and keys (Qwen3); GQA only")
    attention_bias: bool = False
    attention_output_bias: bool = Field(
        True, description="with attention_bias: also on the output projection; Qwen2 has none there"
    )
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = True
    max_position_embeddings: int = Field(256, ge=8)
    num_nextn_predict_layers: int = Field(0, ge=0, le=1, description="multi-token prediction depth")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        existing = data.get("from") or data.get("from_")
        depth = data.get("depth")
        preset = data.get("preset", "custom" if existing or depth else "nano")
        if depth and (existing or preset != "custom"):
            raise ValueError(
                f"depth = {depth} gives the whole shape; leave {'from' if existing else 'preset'} out"
            )
        if type(depth) is int and 1 <= depth <= 128:
            shape = shape_of_depth(depth)
            if (data.get("attention", "mla"), data.get("ffn", "moe")) != ("mla", "moe"):
                shape["num_nextn_predict_layers"] = 0  # no family has that layer without both
            return {**shape, **data, "preset": preset}
        if existing and preset != "custom":
            raise ValueError(
                f"from = '{existing}' brings its own shape; leave preset = '{preset}' out"
            )
        if preset == "custom":
            return {**data, "preset": preset}
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(
                f"'{preset}' is not a preset; allowed: custom, {', '.join(PRESETS)}.{nearest(str(preset), PRESETS)}"
            )
        return {**PRESETS[preset], **data}

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.attention == "gqa" and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.attention == "mla" and self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary pairs need two numbers each"
            )
        if self.ffn == "moe":
            if self.n_routed_experts % self.n_group:
                raise ValueError(
                    f"n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}"
                )
            if self.topk_group > self.n_group:
                raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
            allowed = self.topk_group * (self.n_routed_experts // self.n_group)
            if self.num_experts_per_tok > allowed:
                raise ValueError(
                    f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {allowed} experts that the groups leave"
                )
        return self


def shape_of_depth(depth: int) -> dict[str, int]:
    """Sizes of a model with `depth` layers, by published rules.

    width 64 a layer       loss is flat between 50 and 100 (Kaplan et al. 2020, arXiv 2001.08361, figure 5)
    head 128, 64 if small  latent 4 heads, rotary half a head (DeepSeek-V2, arXiv 2405.04434, section 3.1.2); nope the other half, so
                           that queries are as wide as values (training.md 0.8; V2 itself has a whole head there)
    feed-forward 8/3       as many weights as a plain one of 4 (Shazeer 2020, arXiv 2002.05202)
    experts a quarter      fine-grained, one shared, three routed: a token passes as many weights as in a dense layer
                           (DeepSeekMoE, arXiv 2401.06066); 16 of them, 64 from 12 layers on; the first layer is dense
    prediction layer       from 12 layers (0.9 B) on, where there are MLA and experts; small models gain nothing by it (Gloeckle et al. 2024,
                           arXiv 2404.19737)
    """
    width, head = 64 * depth, 128 if depth >= 8 else 64
    dense = -(-width * 8 // 3 // 64) * 64
    heads = max(1, -(-width // head))
    return {
        "num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": head, "v_head_dim": head, "qk_nope_head_dim": head // 2, "qk_rope_head_dim": head // 2,
        "kv_lora_rank": 4 * head, "intermediate_size": dense, "moe_intermediate_size": dense // 4,
        "n_routed_experts": 64 if depth >= 12 else 16, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "max_position_embeddings": 2048, "num_nextn_predict_layers": 1 if depth >= 12 else 0,
    }  # fmt: skip


# `nope + rope == v_head_dim` keeps the fast attention paths (training.md 0.8). From `mini` up the geometry is the one fast
# kernels want: latent 512 + rope 64, head count a power of two (inference.md finding 4).
PRESETS: dict[str, dict[str, Any]] = {
    "tick": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32,
                 qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, head_dim=16, intermediate_size=192,
                 moe_intermediate_size=192, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
                 max_position_embeddings=128),
    "nano": dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=48,
                 qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, head_dim=24, intermediate_size=256,
                 moe_intermediate_size=96, n_routed_experts=4, num_experts_per_tok=1, max_position_embeddings=128),
    "mini": dict(vocab_size=16384, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
                 q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128, head_dim=64,
                 intermediate_size=1536, moe_intermediate_size=384, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
                 topk_group=2, routed_scaling_factor=1.0, max_position_embeddings=4096),
    "v3": dict(vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128,
               q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, head_dim=64,
               intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
               num_experts_per_tok=8, n_group=8, topk_group=4, first_k_dense_replace=3, routed_scaling_factor=2.5,
               tie_word_embeddings=False, max_position_embeddings=4096, num_nextn_predict_layers=1),
}  # fmt: skip
