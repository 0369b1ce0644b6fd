"""Any of reasoning-gym's families by its own name: `gym:spell_backward`. Its words, its scorer; no solver, so GRPO alone trains on it.

The four families with a module of their own (chain_sum, countdown, ...) ask the same problems in a short form and can solve them.
"""

from __future__ import annotations

from dataclasses import dataclass

from bascule.data.tasks import gym, gym_datasets
from bascule.data.tasks.base import Options, Problem
from bascule.errors import RecipeError, nearest

PREFIX = "gym"


@dataclass(frozen=True)
class Family:
    """Options: reasoning-gym's own settings of that family."""

    family: str

    def __post_init__(self) -> None:
        if self.family == "composite":
            raise RecipeError(
                "Task 'gym:composite' mixes other families, which no option of a recipe can name. List them in data.tasks, each with its weight."
            )
        try:
            gym_datasets.kind(self.family)
        except KeyError:
            names = gym_datasets.names()
            raise RecipeError(
                f"reasoning-gym has no family '{self.family}'; it has {len(names)}, among them chain_sum, gcd, maze, sudoku."
                f"{nearest(self.family, names)}"
            ) from None

    @property
    def name(self) -> str:
        return f"{PREFIX}:{self.family}"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        settings, _ = gym.settings(self.family, options, {}, {})

        def convert(entry: gym.Entry) -> Problem:
            return Problem(
                task=self.name, question=entry["question"], answer=_answer(entry), key=entry["question"],
                difficulty=_difficulty(entry), metadata=entry["metadata"],
            )  # fmt: skip

        return gym.distinct(self.family, seed, count, settings, convert)

    def verify(self, problem: Problem, completion_text: str) -> float:
        return gym.verify(self.family, problem, completion_text)

    def trace(self, problem: Problem, key: int) -> str | None:
        return None


def _answer(entry: gym.Entry) -> str:
    """One right answer. Five families have none ready, and judge what is said by trying it out: an example of theirs, or ""."""
    if entry["answer"] is not None:
        return str(entry["answer"])
    given = entry["metadata"]
    return str(given.get("example_answer") or given.get("example_correct_answer") or "")


def _difficulty(entry: gym.Entry) -> int:
    """Words of the question: families count their difficulty in units of their own, and many of them several."""
    return len(entry["question"].split())
