from __future__ import annotations

from bascule.data.tasks.base import Problem
from bascule.stages.phases import difficulties


def problem(task: str, difficulty: int) -> Problem:
    return Problem(task=task, question="?", answer="", key="", difficulty=difficulty, metadata={})


def test_difficulty_is_ranked_within_each_task_because_their_units_differ() -> None:
    mixed = [problem("words", 40), problem("terms", 3), problem("words", 90), problem("terms", 5)]
    assert difficulties(mixed) == [0.0, 0.0, 0.5, 0.5]
