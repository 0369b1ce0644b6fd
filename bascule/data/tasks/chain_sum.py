"""Chains of additions and subtractions: `9-8+0+7=?`, solved from the left with every partial sum written down."""

from __future__ import annotations

import re

from bascule.data import chat
from bascule.data.tasks import gym
from bascule.data.tasks.base import Options, Problem
from bascule.data.tasks.direct import OPTION, answers_directly

_DEFAULTS = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}
_TERM = re.compile(r"([+-]?)(-?\d+)")


class ChainSum:
    """Options: reasoning-gym's (`min_terms`, `max_terms`, `min_digits`, `max_digits`, `allow_negation`) and `direct_ratio`."""

    name = "chain_sum"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        settings, own = gym.settings(self.name, options, _DEFAULTS, OPTION)

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
        steps, total = _work_through(problem.metadata["expression"])
        return chat.completion(
            "" if answers_directly(problem, key) else ",".join(steps), str(total)
        )


def _work_through(expression: str) -> tuple[list[str], int]:
    """("9-8+0" -> ["9-8=1", "1+0=1"], 1)."""
    (_, first), *rest = _TERM.findall(expression)
    total, steps = int(first), []
    for operator, number in rest:
        new = total + int(number) if operator == "+" else total - int(number)
        steps.append(f"{total}{operator}{number}={new}")
        total = new
    return steps, total


task = ChainSum()
