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


def test_only_easy_problems_come_with_their_solution() -> None:
    options = {"min_terms": 2, "max_terms": 6}
    data = {"train_problems": 64, "eval_problems": 16, "worked_difficulty": 3, "tasks": [{"name": "chain_sum", "options": options}]}  # fmt: skip
    raw = {"name": "easy", "pools": {"here": {"accelerator": "cpu"}}, "data": data}
    easy = course(recipe_from(raw, source="test"))
    expected = [problem for problem in easy.train if problem.difficulty <= 3]
    assert easy.worked == expected and 0 < len(expected) < len(easy.train)
    assert {problem.difficulty for problem in easy.heldout} > {2, 3}
    both = course(recipe_from(raw | {"data": {**data, "worked_problems": 5}}, source="test"))
    assert both.worked == expected[:5] and len(both.examples(0)) == 5
