from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from reasoning_gym.factory import DATASETS

from bascule.data import chat
from bascule.data.tasks import gym_apart, registry, scorer
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


def test_what_draws_from_the_common_generator_is_a_function_of_the_seed_too() -> None:
    task = registry.get("gym:list_functions")
    random.seed(1)
    first, after = task.problems(3, 30, {}), random.random()
    random.seed(1)
    assert random.random() == after  # nobody else's draws move
    assert task.problems(3, 30, {}) == first
    assert task.problems(4, 30, {}) != first


DRAWN = "from bascule.data.tasks import registry; print([(p.question, p.answer) for p in registry.get('gym:{}').problems(3, 30, {{}})])"


@pytest.mark.parametrize("family", [pytest.param("ransom_note", marks=pytest.mark.slow), "codeio"])
def test_what_depends_on_the_order_of_sets_is_the_same_in_every_process(family: str) -> None:
    said = [
        subprocess.run([sys.executable, "-c", DRAWN.format(family)], env={**os.environ, "PYTHONHASHSEED": order},
                       capture_output=True, text=True, check=True).stdout
        for order in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1] and len(said[0]) > 1000


def test_entries_drawn_apart_are_the_familys_in_batches() -> None:
    whole = list(gym_apart.entries("ransom_note", 7, 40, 40, {}))
    assert list(gym_apart.entries("ransom_note", 7, 40, 5, {})) == whole and len(whole) == 40
    with pytest.raises(RuntimeError, match="could not be drawn in a process apart"):
        list(gym_apart.entries("ransom_note", 7, 2, 2, {"no_such_setting": 1}))


def test_settings_are_the_familys_own_and_wrong_names_are_refused() -> None:
    [problem] = registry.get("gym:spell_backward").problems(
        0, 1, {"min_word_len": 9, "max_word_len": 9}
    )
    assert len(problem.answer) == 9
    with pytest.raises(RecipeError, match="no option 'word'"):
        registry.get("gym:spell_backward").problems(0, 1, {"word": 9})
    with pytest.raises(RecipeError, match="List them in data.tasks"):
        registry.get("gym:composite")
    with pytest.raises(RecipeError, match="Did you mean.*spell_backward"):
        registry.get("gym:spell_backwards")


UNJUDGED = ("boxnet", "graph_color", "rush_hour")
"""Judged by trying out what is said; no right answer comes with the problem."""


@pytest.mark.parametrize("family", ["prime_factorization", "futoshiki", "pool_matrix", "propositional_logic", "rubiks_cube"])  # fmt: skip
def test_answers_beyond_ascii_with_marks_or_by_example_are_paid(family: str) -> None:
    [problem] = registry.get(f"gym:{family}").problems(1, 1, {})
    assert problem.answer and registry.verify(problem, chat.completion("so", problem.answer)) == 1.0
    assert registry.verify(problem, problem.answer) == 0.0
    assert registry.verify(problem, chat.completion("so", f"{problem.answer}</think>")) == 0.0


def test_where_the_right_answer_is_ascii_other_alphabets_digits_are_none() -> None:
    [problem] = registry.get("gym:simple_equations").problems(0, 1, {})
    arabic = "".join(chr(0x660 + int(c)) if c.isdigit() else c for c in problem.answer)
    assert registry.verify(problem, chat.completion("so", arabic)) == 0.0


def test_a_scorer_that_trips_over_an_answer_pays_nothing() -> None:
    for family, said in (("prime_factorization", "no idea"), ("game_of_life", "{}"), ("coin_flip", "9" * 5000)):  # fmt: skip
        [problem] = registry.get(f"gym:{family}").problems(1, 1, {})
        assert registry.verify(problem, chat.completion("so", said)) == 0.0


def test_nonsense_that_a_scorer_would_pay_earns_nothing() -> None:
    halting = registry.get("gym:game_of_life_halting").problems(1, 12, {})
    assert {problem.answer for problem in halting} == {"True", "False"}
    for problem in halting:
        assert registry.verify(problem, chat.completion("so", "x=")) == 0.0
        assert registry.verify(problem, chat.completion("so", problem.answer)) == 1.0
    [product] = registry.get("gym:complex_arithmetic").problems(1, 1, {})
    assert registry.verify(product, chat.completion("so", "nan")) == 0.0


def test_an_answer_that_would_be_computed_for_ever_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(scorer, "LIMIT_S", 0.2)
    [problem] = registry.get("gym:puzzle24").problems(1, 1, {})
    assert registry.verify(problem, chat.completion("so", "9**9**9**9")) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(DATASETS))
def test_every_family_makes_problems_pays_their_answers_and_no_nonsense(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "composite":
        pytest.skip("composite mixes families that its options must name")
    monkeypatch.setattr(scorer, "LIMIT_S", 0.5)
    problems = registry.get(f"gym:{family}").problems(1, 2, {})
    assert problems and all(p.question for p in problems)
    assert registry.get(f"gym:{family}").problems(1, 2, {}) == problems
    for problem in problems:
        if family not in UNJUDGED:
            assert registry.verify(problem, chat.completion("so", problem.answer)) == 1.0
        for said in ("no idea", "9**9**9**9", "nan", "{}", "\x00", "9" * 5000, "(" * 3000):
            assert registry.verify(problem, chat.completion("so", said)) == 0.0
