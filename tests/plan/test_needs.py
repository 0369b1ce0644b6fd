"""What the plan counts on, a step."""

from __future__ import annotations

import pytest

from bascule.config.recipe import Recipe
from bascule.plan.needs import needs
from bascule.plan.options import price_pools


def recipe(*phases: str) -> Recipe:
    pools = {"far": {"accelerator": "npu"}}
    return Recipe.model_validate(
        {"name": "t", "pools": pools, "train": {"phases": phases}, "pretrain": {"data": "x"}}
    )


@pytest.mark.parametrize("phases", [("sft",), ("pretrain",), ("sft", "grpo")])
def test_needs_are_the_plans_own_step_and_rate(phases: tuple[str, ...]) -> None:
    one = recipe(*phases)
    found = needs(one, "far")
    seconds = price_pools(one, {})[0].train_components_s
    named = {"grpo": "grpo updates"}.get(str(found["plan_phase"]), str(found["plan_phase"]))
    steps = one.phase_steps()[str(found["plan_phase"])]
    assert found["plan_step_s"] == pytest.approx(seconds[named] / steps)
    assert found["plan_gflops"] > 0


def test_a_recipe_without_training_needs_nothing() -> None:
    one = recipe("sft")
    idle = one.model_copy(update={"sft": one.sft.model_copy(update={"steps": 0})})
    assert needs(idle, "far") == {}
