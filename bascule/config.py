"""The recipe: every setting of a run, typed, checked once, frozen. Also the only file that reads TOML or the environment.

A room receives its own section, never the whole recipe. `load_recipe` turns a file and `--set` overrides into a `Recipe`;
every refusal names the key's path, the value, what is allowed, and the nearest right name.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bascule.errors import RecipeError, nearest


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, no silent conversions between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


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
        if isinstance(depth, int) and 1 <= depth <= 128:
            return {**shape_of_depth(depth), **data, "preset": preset}
        if existing and preset != "custom":
            raise ValueError(
                f"from = '{existing}' brings its own shape; leave preset = '{preset}' out"
            )
        if preset == "custom":
            return {**data, "preset": preset}
        if preset not in PRESETS:
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
    """
    width, head = 64 * depth, 128 if depth >= 8 else 64
    dense = -(-width * 8 // 3 // 64) * 64
    heads = max(1, -(-width // head))
    return {
        "num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": head, "v_head_dim": head, "qk_nope_head_dim": head // 2, "qk_rope_head_dim": head // 2,
        "kv_lora_rank": 4 * head, "intermediate_size": dense, "moe_intermediate_size": dense // 4,
        "n_routed_experts": 64 if depth >= 12 else 16, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "max_position_embeddings": 2048,
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


class PoolConfig(Section):
    """Chips of one kind that a run may use. `accelerator` is a name for accelerators.open; `a|b` takes the first that opens."""

    accelerator: str = Field(
        ...,
        min_length=1,
        description="cpu, cuda, cuda:1, npu, sim:PROFILE[@BASE]; 'cuda|cpu' = first that opens",
    )
    price_per_hour: float | None = Field(None, ge=0)
    price_unit: str = "USD"
    chips: int = Field(1, ge=1)


class TaskConfig(Section):
    """One family of problems. `name` is a built-in task or an entry point `package.module:task`."""

    name: str
    weight: float = Field(1.0, gt=0)
    options: dict[str, int | float | str | bool] = Field(default_factory=dict)


class DataConfig(Section):
    tasks: tuple[TaskConfig, ...] = (TaskConfig(name="chain_sum"),)
    train_problems: int = Field(
        20_000, ge=16, description="distinct training problems made at most"
    )
    eval_problems: int = Field(256, ge=1)
    eval_seed: int = Field(
        77291, description="held-out problems are drawn with this seed; no tuning looked at it"
    )


class SftConfig(Section):
    data: str | None = Field(
        None,
        description="JSON lines with `messages` to learn from; without it, the tasks' worked solutions",
    )
    steps: int = Field(800, ge=0)
    batch_sequences: int = Field(64, ge=1)
    pack_tokens: int = Field(
        0,
        ge=0,
        description="lay a batch's sequences end to end in rows of this length, masked from each other; 0 = one a row, padded",
    )
    learning_rate: float = Field(3e-3, gt=0, description="AdamW: embeddings, head, norms, router")
    muon_learning_rate: float = Field(
        0.02, ge=0, description="Muon: matrices, experts included; 0 = AdamW for all"
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(20, ge=0)
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    clip_grad_norm: float = Field(1.0, gt=0)


class PretrainConfig(Section):
    """Learning to read: next-token prediction on shards of text (`bascule tokenize`)."""

    data: str | None = Field(None, description="folder of shards written by bascule tokenize")
    steps: int = Field(1000, ge=0)
    batch_sequences: int = Field(16, ge=1)
    sequence_length: int = Field(256, ge=2, description="tokens of one training window")
    learning_rate: float = Field(3e-3, gt=0, description="AdamW: embeddings, head, norms, router")
    muon_learning_rate: float = Field(0.02, ge=0, description="Muon: matrices; 0 = AdamW for all")
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["wsd", "linear"] = Field(
        "wsd", description="wsd: full rate, then down in the last decay_ratio of the steps"
    )
    warmup_steps: int = Field(20, ge=0)
    decay_ratio: float = Field(0.2, gt=0, le=1)
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    clip_grad_norm: float = Field(1.0, gt=0)
    document_mask: bool = Field(True, description="no token sees another document of its window")
    eval_sequences: int = Field(256, ge=1, description="held-out windows measured at most")


class GrpoConfig(Section):
    """GRPO: group advantage by mean only, token-level loss, clip-higher, no KL (training.md 2.6)."""

    algorithm: Literal["default", "grpo", "dr_grpo", "dapo", "gspo", "cispo"] = Field(
        "default",
        description="advantage and loss as published (train/policy.py); gspo wants clips near 3e-4",
    )
    steps: int = Field(
        150,
        ge=0,
        description="optimizer updates; each rollout batch serves `updates_per_rollout` of them",
    )
    prompts: int = Field(32, ge=1)
    group_size: int = Field(8, ge=2)
    updates_per_rollout: int = Field(2, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    warmup_steps: int = Field(0, ge=0)
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    correction: Literal["none", "token", "sequence", "icepop"] = Field(
        "token", description="weight for the rollout engine's deviation (train/correction.py)"
    )
    importance_cap: float = Field(
        2.0, gt=0, description="truncated importance sampling of the rollout mismatch"
    )
    icepop_low: float = Field(0.5, gt=0, description="tokens whose ratio is below are masked")
    icepop_high: float = Field(5.0, gt=0, description="tokens whose ratio is above are masked")
    sequence_guard: float = Field(
        0.0,
        ge=0,
        description="mask samples whose geometric-mean ratio leaves 1 +- this; published 0.01, short answers 0.1; 0 = off",
    )
    router_replay: bool = Field(
        False,
        description="the trainer sends each token to the experts that the engine chose (R3, arXiv 2510.11370)",
    )
    one_step_off: bool = Field(
        False,
        description="sample the next rollout while this one is learnt from, with the weights of its start",
    )
    refill_rounds: int = Field(
        0,
        ge=0,
        description="dynamic sampling (DAPO): ask again, so often at most, for prompts in place of groups without contrast",
    )
    curriculum: Literal["none", "easy_first"] = Field(
        "none",
        description="easy_first: the easiest quarter of the prompts, all of them after half of the steps",
    )
    retire_after: int = Field(
        0,
        ge=0,
        description="leave a prompt out once its whole group was right so often running; 0 = never",
    )
    temperature: float = Field(1.0, gt=0)
    max_completion_tokens: int = Field(64, ge=1)
    clip_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    min_start_pass_at_16: float = Field(
        0.2, ge=0, le=1, description="refuse to start when pass@16 of the start model is below this"
    )


class TrainConfig(Section):
    phases: tuple[Literal["pretrain", "sft", "grpo"], ...] = ("sft", "grpo")
    steps: int | None = Field(
        None,
        ge=0,
        description="stop after this many steps in all; default: all steps of all phases",
    )
    snapshot_every_steps: int = Field(50, ge=1)
    keep_snapshots: int = Field(
        3, ge=2, description="certified generations kept; one must always lie behind the newest"
    )
    router_bias_speed: float = Field(
        1e-3, ge=0, description="auxiliary-loss-free balancing, sign update (DeepSeek-V3)"
    )
    balance_loss_weight: float = Field(
        0.0,
        ge=0,
        description="sequence-wise balance of experts in pretrain and sft; DeepSeek-V3 took 1e-4",
    )
    mtp_loss_weight: float = Field(
        0.3,
        ge=0,
        description="weight of the prediction layer's loss in pretrain and sft, where the model has one",
    )
    mtp_final_loss_weight: float = Field(0.1, ge=0, description="the same after mtp_switch_ratio")
    mtp_switch_ratio: float = Field(0.67, ge=0, le=1, description="share of the phase's steps")


class GuardConfig(Section):
    enabled: bool = True
    checksum_every_steps: int = Field(
        64,
        ge=1,
        description="check every matmul of every n-th step, forward and both backward products",
    )
    audit_every_steps: int = Field(
        200, ge=1, description="replay one rotating layer of every n-th step on the referee"
    )
    budget_percent: Annotated[float, Field(gt=0, le=100)] | Literal["full"] | None = Field(
        None,
        description="share of the step time for checksums and audits; their intervals follow from costs measured in the run. 'full': every step; unset: the intervals above",
    )
    certify_sequences: int = Field(
        8,
        ge=0,
        description="sequences of the step after a snapshot that the referee replays to certify it; 0 = all",
    )
    spike_sigma: float = Field(
        8.0, gt=0, description="robust z-score of loss and gradient norm that raises an alarm"
    )
    hang_timeout_s: float = Field(60.0, gt=0, description="no progress for this long is a hang")
    start_timeout_s: float = Field(
        180.0, gt=0, description="a worker must show its first progress within this time"
    )
    transient_strikes: int = Field(
        2, ge=1, description="confirmed transient faults before a chip is condemned anyway"
    )


class QualifyConfig(Section):
    quick: bool = True
    time_limit_s: float = Field(
        180.0, gt=0, description="per pool; a check that does not end is evidence"
    )
    required: bool = Field(
        True, description="refuse to place a role on a pool whose verdict is not fit"
    )
    parallel: int = Field(
        1,
        ge=1,
        description="pools examined at the same time; more than 1 blurs the speeds of pools that share a machine",
    )
    max_age_days: float = Field(
        90.0,
        gt=0,
        description="an older verdict is void: bad silicon often shows only after months",
    )


class EvaluateConfig(Section):
    samples: int = Field(
        8, ge=1, description="samples per held-out problem, for pass@1 and pass@k at temperature 1"
    )
    min_pass_at_1: float | None = Field(
        None, ge=0, le=1, description="gate: exit 3 when the final pass@1 is below this"
    )


class ServeConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    max_queue: int = Field(64, ge=1)
    reproducible: bool = Field(
        False,
        description="equal bits whatever else is in the batch; a step costs 1.1 to 3.5 times as much",
    )
    audit_every: int = Field(
        32,
        ge=0,
        description="every n-th answer is scored again on the CPU; 0 = never, and never when the CPU itself serves",
    )


class Recipe(Section):
    """The whole recipe. Pools are listed in `prefer` in the owner's order of preference (default: as written)."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    threads: int = Field(
        1, ge=1, description="CPU threads of each worker; part of what makes two runs bit-equal"
    )
    strict: bool = Field(False, description="every warning is an error")
    prefer: tuple[str, ...] = ()
    pools: dict[str, PoolConfig] = Field(..., min_length=1)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    qualify: QualifyConfig = Field(default_factory=QualifyConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        for pool in self.prefer:
            if pool not in self.pools:
                raise ValueError(
                    f"prefer: '{pool}' is not a pool; pools: {', '.join(self.pools)}.{nearest(pool, self.pools)}"
                )
        if len(set(self.prefer)) != len(self.prefer):
            raise ValueError(f"prefer: {list(self.prefer)} names a pool twice")
        if (
            "grpo" in self.train.phases
            and self.grpo.prompts * self.grpo.group_size % self.grpo.updates_per_rollout
        ):
            raise ValueError(
                f"grpo.updates_per_rollout={self.grpo.updates_per_rollout} must divide prompts*group_size="
                f"{self.grpo.prompts * self.grpo.group_size}"
            )
        if "pretrain" in self.train.phases and self.pretrain.data is None:
            raise ValueError(
                "train.phases holds 'pretrain' and pretrain.data is not set; give the folder that bascule tokenize wrote"
            )
        if len(set(self.train.phases)) != len(self.train.phases):
            raise ValueError(
                f"train.phases: {list(self.train.phases)} names a phase twice; each of pretrain, sft and grpo is allowed once"
            )
        return self

    @property
    def order(self) -> tuple[str, ...]:
        """All pools, preferred first; pools that `prefer` leaves out follow in the order written."""
        return self.prefer + tuple(pool for pool in self.pools if pool not in self.prefer)

    def phase_steps(self) -> dict[str, int]:
        """Steps of each phase in order, after `train.steps` has cut them."""
        left = self.train.steps
        result: dict[str, int] = {}
        for phase in self.train.phases:
            sections: dict[str, PretrainConfig | SftConfig | GrpoConfig]
            sections = {"pretrain": self.pretrain, "sft": self.sft, "grpo": self.grpo}
            wanted = sections[phase].steps
            result[phase] = wanted if left is None else min(wanted, left)
            left = None if left is None else left - result[phase]
        return result

    def total_steps(self) -> int:
        return sum(self.phase_steps().values())


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, apply `key.path=value` overrides (values in TOML syntax, bare words are strings), check, freeze.

    Raises RecipeError with the key's path, the value, what is allowed and the nearest right name.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"The recipe '{path}' does not exist. Give the path of a TOML file, for instance runs/demo.toml."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe '{path}' is not valid TOML: {error}.") from None
    raw.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(raw, override)
    return recipe_from(raw, source=str(path))


def recipe_from(raw: Mapping[str, Any], *, source: str) -> Recipe:
    """Check a plain mapping as a recipe. `source` is named in the error."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(
            "\n".join([f"The recipe {source} is refused:", *_explain(error)])
        ) from None


def read_resolved(path: Path) -> Recipe:
    """Read a run folder's `recipe.json`. Raises RecipeError when it is missing or was written by an incompatible version."""
    try:
        return recipe_from(json.loads(path.read_text(encoding="utf-8")), source=str(path))
    except FileNotFoundError:
        raise RecipeError(
            f"'{path.parent}' is not a run folder: it has no recipe.json. Give the folder under out/."
        ) from None
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"'{path}' is damaged ({error}). Restore it from the recipe with the same overrides."
        ) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise RecipeError(
            f"--set '{override}' is not KEY.PATH=VALUE, for instance --set train.steps=20."
        )
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = dotted.strip().split(".")
    here = raw
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise RecipeError(f"--set {dotted}: '{parent}' is a value, not a section.")
    here[leaf] = value


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            allowed = sorted(_allowed_at(item["loc"][:-1]))
            lines.append(
                f"  {where}: unknown key; allowed here: {', '.join(allowed)}.{nearest(str(item['loc'][-1]), allowed)}"
            )
        elif item["type"] == "missing":
            lines.append(f"  {where}: is required and missing.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = (
                ""
                if isinstance(item.get("input"), (dict, list))
                else f" (given: {item.get('input')!r})"
            )
            lines.append(f"  {where}: {message}{given}")
    return lines


def _allowed_at(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `location`; pool and task names are stepped over."""
    section: type[BaseModel] = Recipe
    for part in location:
        if part in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            if part == "pools":
                section = PoolConfig
            elif part == "tasks":
                section = TaskConfig
            elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
    return [field.alias or name for name, field in section.model_fields.items()]


def package_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file that ships inside the package (profiles, plan data). It is ours, so a mistake in it is a crash."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def environment(name: str, default: str | None = None) -> str | None:
    """Read one environment variable. Every read in the package passes here, so that a grep finds them all."""
    return os.environ.get(name, default)


def set_environment_default(name: str, value: str) -> None:
    """Set a variable that a library reads, unless the owner has set it."""
    os.environ.setdefault(name, value)


def whole_environment() -> dict[str, str]:
    """A copy of the environment, to hand on to a child process."""
    return dict(os.environ)
