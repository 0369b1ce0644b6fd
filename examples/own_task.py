"""A task of your own in 30 lines: the largest of some numbers. In a recipe: [[data.tasks]] name = "examples.own_task:task"."""

from __future__ import annotations

from bascule import draws
from bascule.data import chat
from bascule.data.tasks.base import Options, Problem


class Largest:
    name = "largest"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        """Distinct problems out of `seed` alone; fewer than `count` when there are no more."""
        size, found = int(options.get("numbers", 4)), {}
        for index in range(4 * count):
            numbers = draws.integers(draws.key(seed, "largest", index), 100, size).tolist()
            question = f"max({','.join(map(str, numbers))})=?"
            found[question] = Problem(task=self.name, question=question, answer=str(max(numbers)), key=question,
                                      difficulty=size, metadata={"numbers": numbers})  # fmt: skip
        return list(found.values())[:count]

    def verify(self, problem: Problem, completion_text: str) -> float:
        parsed = chat.parse_strict(
            completion_text
        )  # (thought, answer), or None when the form is wrong
        return 1.0 if parsed is not None and parsed[1] == problem.answer else 0.0

    def trace(self, problem: Problem, key: int) -> str | None:
        """A worked solution for SFT: the largest so far, number by number."""
        numbers = problem.metadata["numbers"]
        return chat.completion(
            ",".join(str(max(numbers[:i])) for i in range(1, len(numbers) + 1)), problem.answer
        )


task = Largest()
