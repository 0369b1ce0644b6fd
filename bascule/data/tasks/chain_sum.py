"""Chains of additions and subtractions: `9-8+0+7=?`, solved from the left with every partial sum written down."""

from __future__ import annotations

import re

from bascule import draws
from bascule.data import chat
from bascule.data.tasks import gym
from bascule.data.tasks.base import Options, Problem
from bascule.data.tasks.direct import OPTION, answers_directly

_OWN = {**OPTION, "wrong_ratio": 0.0}
_DEFAULTS = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}
_TERM = re.compile(r"([+-]?)(-?\d+)")


class ChainSum:
    """Options: reasoning-gym's (`min_terms`, `max_terms`, `min_digits`, `max_digits`, `allow_negation`), `direct_ratio`, and `wrong_ratio`:
    the share of worked examples in which one step goes wrong and all after it follow, as from a teacher that errs. The corpus drops them
    unless the recipe says `data.verify_solutions = false`."""

    name = "chain_sum"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        settings, own = gym.settings(self.name, options, _DEFAULTS, _OWN)

        def convert(entry: gym.Entry) -> Problem:
            expression = entry["metadata"]["expression"].replace(" ", "")
            return Problem(
                task=self.name, question=f"{expression}=?", answer=entry["answer"], key=expression,
                difficulty=entry["metadata"]["num_terms"], metadata={"expression": expression, **own},
            )  # fmt: skip

        return gym.distinct(self.name, seed, count, settings, convert)

    def verify(self, problem: Problem, completion_text: str) -> float:
        return gym.verify(self.name, problem, completion_text)

    def trace(self, problem: Problem, key: int) -> str | None:
        wrong_at, slip = _slip(problem, key)
        steps, total = _work_through(problem.metadata["expression"], wrong_at, slip)
        return chat.completion(
            "" if answers_directly(problem, key) else ",".join(steps), str(total)
        )


def _work_through(
    expression: str, wrong_at: int | None = None, slip: int = 0
) -> tuple[list[str], int]:
    """("9-8+0" -> ["9-8=1", "1+0=1"], 1); the result of step `wrong_at` is off by `slip`."""
    (_, first), *rest = _TERM.findall(expression)
    total, steps = int(first), []
    for index, (operator, number) in enumerate(rest):
        new = total + int(number) if operator == "+" else total - int(number)
        new += slip if index == wrong_at else 0
        steps.append(f"{total}{operator}{number}={new}")
        total = new
    return steps, total


def _slip(problem: Problem, key: int) -> tuple[int | None, int]:
    """Which step of the trace drawn with `key` goes wrong, and by how much (1 to 3 either way); (None, 0) where none does."""
    if (
        float(draws.uniform(draws.key(key, "task.wrong"), (1,))[0])
        >= problem.metadata["wrong_ratio"]
    ):
        return None, 0
    where, size, sign = draws.integers(draws.key(key, "task.slip"), 1 << 30, 3).tolist()
    return where % (problem.difficulty - 1), (1 + size % 3) * (1 if sign % 2 else -1)


task = ChainSum()
