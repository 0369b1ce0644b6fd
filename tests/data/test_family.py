from __future__ import annotations

import pytest
from reasoning_gym.factory import DATASETS

from bascule.data import chat
from bascule.data.tasks import registry
from bascule.errors import RecipeError


@pytest.mark.parametrize("family", ["spell_backward", "simple_equations", "zebra_puzzles"])
def test_a_family_is_reached_by_its_name_and_pays_its_own_answers(family: str) -> None:
    task = registry.get(f"gym:{family}")
    problems = task.problems(5, 4, {})
    assert problems == task.problems(5, 4, {}) and len({p.key for p in problems}) == 4
    for problem in problems:
        assert registry.verify(problem, chat.completion("so", problem.answer)) == 1.0
        assert registry.verify(problem, chat.completion("so", "no idea")) == 0.0
        assert task.trace(problem, 0) is None


def test_settings_are_the_familys_own_and_wrong_names_are_refused() -> None:
    [problem] = registry.get("gym:spell_backward").problems(
        0, 1, {"min_word_len": 9, "max_word_len": 9}
    )
    assert len(problem.answer) == 9
    with pytest.raises(RecipeError, match="no option 'word'"):
        registry.get("gym:spell_backward").problems(0, 1, {"word": 9})
    with pytest.raises(RecipeError, match="Did you mean.*spell_backward"):
        registry.get("gym:spell_backwards")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(DATASETS))
def test_every_family_makes_problems(family: str) -> None:
    if family == "composite":
        pytest.skip("composite mixes families that its options must name")
    problems = registry.get(f"gym:{family}").problems(1, 2, {})
    assert problems and all(p.question and p.answer for p in problems)
