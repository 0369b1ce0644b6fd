"""What a recipe's plan counts on, as a rate: the training step that a measured chip is held beside. No torch."""

from __future__ import annotations

from bascule.config.recipe import Recipe
from bascule.plan.architecture import from_config
from bascule.plan.options import TYPICAL_LENGTH_SHARE, price_pools

_COMPONENT = {"grpo": "grpo updates"}  # its rollouts are inference


def needs(recipe: Recipe, pool: str) -> dict[str, float | str]:
    """Of the phase that the plan gives the most time on `pool`: its name, the seconds a step is planned to take, the step's GFLOP, and
    the GFLOP/s which that asks for. Empty when the recipe trains nothing."""
    option = next(one for one in price_pools(recipe, {}) if one.pool == pool)
    steps = {phase: count for phase, count in recipe.phase_steps().items() if count}
    if not steps:
        return {}
    planned_s = {phase: option.train_components_s[_COMPONENT.get(phase, phase)] for phase in steps}
    phase = max(planned_s, key=lambda name: planned_s[name])
    sequences, length = _batch(recipe, phase)
    gflop = sequences * length * from_config(recipe.model).train_flops(int(length)) / 1e9
    step_s = planned_s[phase] / steps[phase]
    return {
        "plan_phase": phase,
        "plan_step_s": step_s,
        "plan_step_gflop": gflop,
        "plan_gflops": gflop / step_s,
    }


def _batch(recipe: Recipe, phase: str) -> tuple[float, float]:
    """Sequences of one step and tokens of one sequence, as the plan counts them."""
    if phase == "pretrain":
        return recipe.pretrain.batch_sequences, recipe.pretrain.sequence_length
    length = TYPICAL_LENGTH_SHARE * recipe.model.max_position_embeddings
    if phase == "sft":
        return recipe.sft.batch_sequences, length
    grpo = recipe.grpo
    return grpo.prompts * grpo.group_size // grpo.updates_per_rollout, length
