"""What a recipe's plan counts on, as a rate: the training step that a measured chip is held beside. No torch."""

from __future__ import annotations

from bascule.config.recipe import Recipe
from bascule.plan.architecture import from_config
from bascule.plan.lengths import Lengths, assumed
from bascule.plan.options import price_pools, typical_step

_COMPONENT = {"grpo": "grpo updates"}  # its rollouts are inference


def needs(recipe: Recipe, pool: str, lengths: Lengths | None = None) -> dict[str, float | str]:
    """Of the phase that the plan gives the most time on `pool`: its name, the seconds a step is planned to take, the step's GFLOP, and
    the GFLOP/s which that asks for. Empty when the recipe trains nothing."""
    texts = lengths or assumed(recipe)
    option = next(one for one in price_pools(recipe, {}, lengths=texts) if one.pool == pool)
    steps = {phase: count for phase, count in recipe.phase_steps().items() if count}
    if not steps:
        return {}
    planned_s = {phase: option.train_components_s[_COMPONENT.get(phase, phase)] for phase in steps}
    phase = max(planned_s, key=lambda name: planned_s[name])
    tokens, length = typical_step(recipe, phase, texts)
    gflop = tokens * from_config(recipe.model).train_flops(int(length)) / 1e9
    step_s = planned_s[phase] / steps[phase]
    return {
        "plan_phase": phase,
        "plan_step_s": step_s,
        "plan_step_gflop": gflop,
        "plan_gflops": gflop / step_s,
    }
