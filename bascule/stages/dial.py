"""One dial: from `model.depth` to learning rate, batch and steps of pretraining. The shape itself is config.shape_of_depth. No torch.

    tokens          20 for each active parameter outside embedding and head (Hoffmann et al. 2022, arXiv 2203.15556)
    batch, rate     0.2920 C^0.3271 tokens and 0.3118 C^-0.1250 for AdamW, C the run's FLOPs (DeepSeek LLM, arXiv 2401.02954,
                    equation 1; fitted between 1e17 and 2e19: below that it is an extrapolation, and said so)
    Muon's rate     0.02 at every width: the update's spectral norm does not depend on it (Jordan 2024; arXiv 2502.16982)

What the recipe sets itself is left alone. A preset is a shape alone: there the rules' figures are told beside the recipe's, and change nothing.
"""

from __future__ import annotations

from typing import Any

from bascule.config.model import ModelConfig
from bascule.config.recipe import Recipe
from bascule.model import count

TOKENS_PER_PARAMETER = 20
FITTED_FLOPS = (1e17, 2e19)


def turn(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """(recipe with the derived settings of its pretrain phase, what was derived in lines for people)."""
    model, pretrain = recipe.model, recipe.pretrain
    name = f"depth {model.depth}" if model.depth else f"preset {model.preset}"
    lines = [f"{name}: {_shape(model)}"]
    if "pretrain" not in recipe.train.phases:
        return recipe, lines
    length = pretrain.sequence_length
    learned = count.active_parameters(model) - model.vocab_size * model.hidden_size
    tokens = TOKENS_PER_PARAMETER * max(1, learned)
    flops = tokens * count.train_flops_per_token(model, length)
    rows = max(1, round(0.2920 * flops**0.3271 / length))
    derived: dict[str, Any] = {
        "batch_sequences": rows,
        "steps": max(1, -(-tokens // (rows * length))),
        "learning_rate": float(f"{0.3118 * flops**-0.1250:.3g}"),
        "muon_learning_rate": 0.02,
    }
    kept = pretrain.model_fields_set if model.depth else derived
    new = {key: value for key, value in derived.items() if key not in kept}
    range_note = (
        "" if FITTED_FLOPS[0] <= flops <= FITTED_FLOPS[1] else ", outside the rule's fitted range"
    )
    told = ", ".join(
        f"{key} {value}{'' if key in new else f' (the recipe says {getattr(pretrain, key)})'}"
        for key, value in derived.items()
    )
    lines.append(f"{name}: the rule gives {tokens:,} tokens, {flops:.2e} FLOPs{range_note}; {told}")
    return recipe.model_copy(update={"pretrain": pretrain.model_copy(update=new)}), lines


def _shape(model: ModelConfig) -> str:
    latent = model.attention == "mla"
    parts = [
        f"{model.num_hidden_layers} layers, width {model.hidden_size}",
        f"{model.num_attention_heads} heads of {model.v_head_dim if latent else model.head_dim}",
    ]
    if latent:
        parts.append(f"latent {model.kv_lora_rank}")
    if model.ffn == "moe":
        parts.append(
            f"{model.n_routed_experts} experts of {model.moe_intermediate_size} ({model.num_experts_per_tok} a token, "
            f"{model.n_shared_experts} shared)"
        )
    if model.num_nextn_predict_layers:
        parts.append("a prediction layer")
    total, active = count.parameters(model), count.active_parameters(model)
    spoken = "" if total == active else f", {active:,} active"
    return f"{', '.join(parts)}; {total:,} parameters{spoken}"
