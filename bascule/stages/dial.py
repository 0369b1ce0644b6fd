"""One dial: what a recipe leaves out beside `model.depth` or `model.preset`, by published rules. No torch.

    tokens          20 for each active parameter outside embedding and head (Hoffmann et al. 2022, arXiv 2203.15556)
    batch, rate     0.2920 C^0.3271 tokens and 0.3118 C^-0.1250 for AdamW, C the FLOPs of those tokens (DeepSeek LLM, arXiv 2401.02954,
                    equation 1; fitted between 1e17 and 2e19: outside it is an extrapolation, and said so)
    Muon's rate     0.02 at every width: the update's spectral norm does not depend on it (Jordan 2024; arXiv 2502.16982)
    SFT's rate      a tenth of pretraining's, where the recipe pretrains (SmolLM3: 2e-5 after 2e-4; DeepSeek-V3 took a fortieth)
    GRPO's rate     1e-6 from a billion parameters on (DAPO, arXiv 2503.14476), 1e-5 below

The last two are for models that somebody published: under 10 M parameters the sections' own defaults stay, which were measured here
(docs/log.md). The shape itself comes from the preset's table or from config.shape_of_depth. What the recipe says is left alone; the
rule's figure is then told beside it. A dry run that only shortens `steps` keeps batch and rates of the whole one.
"""

from __future__ import annotations

from collections.abc import Iterator

from bascule.config.model import ModelConfig, shape_of_depth
from bascule.config.recipe import Recipe
from bascule.config.section import Section
from bascule.model import count
from bascule.records import Derivation, DialTurned

TOKENS_PER_PARAMETER = 20
FITTED_FLOPS = (1e17, 2e19)
RATES_FROM_PARAMETERS = 10_000_000
BILLION = 1_000_000_000


def turn(recipe: Recipe, vocabulary: int) -> tuple[Recipe, DialTurned]:
    """(recipe with the derived settings, what was derived). `vocabulary` is the tokenizer's size: parameters are counted with it, whatever
    the recipe says, since a run's model has it."""
    model = recipe.model.model_copy(update={"vocab_size": vocabulary})
    found: list[Derivation] = []
    if model.depth:
        found += _of_shape(model, model.depth)
    if "pretrain" in recipe.train.phases:
        found += _of_pretraining(recipe, model)
        recipe = _with(recipe, found)
    if count.parameters(model) >= RATES_FROM_PARAMETERS:
        found += [*_of_sft(recipe), *_of_grpo(recipe, model)]
    name = f"depth {model.depth}" if model.depth else f"preset {model.preset}"
    return _with(recipe, found), DialTurned(dial=name, shape=_shape(model), derived=tuple(found))


def lines(turned: DialTurned) -> list[str]:
    """For people: the shape, then a line for each setting of training; those of the shape stand in the first."""
    told = [f"{turned.dial}: {turned.shape}"]
    for one in turned.derived:
        if not one.setting.startswith("model."):
            kept = "" if one.stated is None else f"; the recipe says {one.stated}, which stays"
            told.append(f"{turned.dial}: {one.setting} = {one.value} by the rule {one.rule}{kept}")
    return told


def _with(recipe: Recipe, found: list[Derivation]) -> Recipe:
    new: dict[str, dict[str, float]] = {}
    for one in found:
        section, _, key = one.setting.partition(".")
        if one.stated is None and section != "model":
            new.setdefault(section, {})[key] = one.value
    update = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in new.items()}
    return recipe.model_copy(update=update)


def _derive(name: str, section: Section, key: str, value: float, rule: str) -> Derivation:
    stated = getattr(section, key) if key in section.model_fields_set else None
    return Derivation(setting=f"{name}.{key}", value=value, rule=rule, stated=stated)


def _of_shape(model: ModelConfig, depth: int) -> Iterator[Derivation]:
    """A size that differs from the rule's was set in the recipe (or is the prediction layer of a family that has none)."""
    for key, value in shape_of_depth(depth).items():
        if getattr(model, key) == value:
            yield Derivation(setting=f"model.{key}", value=value, rule="config.shape_of_depth")


def _of_pretraining(recipe: Recipe, model: ModelConfig) -> Iterator[Derivation]:
    pretrain = recipe.pretrain
    length = pretrain.sequence_length
    learned = count.active_parameters(model) - model.vocab_size * model.hidden_size
    tokens = TOKENS_PER_PARAMETER * max(1, learned)
    flops = tokens * count.train_flops_per_token(model, length)
    low, high = FITTED_FLOPS
    source = f"C = {flops:.2e} FLOPs (DeepSeek LLM, arXiv 2401.02954" + (")" if low <= flops <= high else "; outside its fitted range)")  # fmt: skip
    rows = max(1, round(0.2920 * flops**0.3271 / length))
    batch = _derive("pretrain", pretrain, "batch_sequences", rows, f"0.2920 C^0.3271 tokens, {source}")  # fmt: skip
    yield batch
    step_tokens = int(batch.value if batch.stated is None else batch.stated) * length
    yield _derive(
        "pretrain", pretrain, "steps", max(1, -(-tokens // step_tokens)),
        f"{TOKENS_PER_PARAMETER} tokens a parameter, {tokens:,} in all (arXiv 2203.15556), {step_tokens:,} a step",
    )  # fmt: skip
    rate = float(f"{0.3118 * flops**-0.1250:.3g}")
    yield _derive("pretrain", pretrain, "learning_rate", rate, f"0.3118 C^-0.1250, {source}")
    yield _derive("pretrain", pretrain, "muon_learning_rate", 0.02, "0.02 at every width (Jordan 2024)")  # fmt: skip


def _of_sft(recipe: Recipe) -> Iterator[Derivation]:
    """`recipe` already has pretraining's rates. Without pretraining SFT learns from nothing: no share of anything."""
    if not {"pretrain", "sft"} <= set(recipe.train.phases):
        return
    for key in ("learning_rate", "muon_learning_rate"):
        rate = float(f"{getattr(recipe.pretrain, key) / 10:.3g}")
        yield _derive("sft", recipe.sft, key, rate, "a tenth of pretraining's (SmolLM3)")


def _of_grpo(recipe: Recipe, model: ModelConfig) -> Iterator[Derivation]:
    if "grpo" not in recipe.train.phases:
        return
    large = count.parameters(model) >= BILLION
    rule = "1e-6 from a billion parameters on (DAPO, arXiv 2503.14476), 1e-5 below"
    yield _derive("grpo", recipe.grpo, "learning_rate", 1e-6 if large else 1e-5, rule)


def _shape(model: ModelConfig) -> str:
    latent = model.attention == "mla"
    parts = [
        f"{model.num_hidden_layers} layers, width {model.hidden_size}, vocabulary {model.vocab_size:,}",
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
