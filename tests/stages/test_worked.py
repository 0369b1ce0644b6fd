"""Few worked solutions, many problems: what each phase gets of them."""

from __future__ import annotations

from bascule.config.load import recipe_from
from bascule.stages.course import course


def test_sft_learns_from_the_worked_problems_only_and_grpo_asks_all() -> None:
    raw = {"name": "few", "pools": {"here": {"accelerator": "cpu"}}, "data": {"train_problems": 64, "eval_problems": 16}}  # fmt: skip
    whole = course(recipe_from(raw, source="test"))
    few = course(recipe_from(raw | {"data": {**raw["data"], "worked_problems": 10}}, source="test"))
    assert few.train == whole.train and len(few.prompts(few.train)) == 64
    assert len(whole.examples(0)) == 64 and few.examples(0) == whole.examples(0)[:10]
