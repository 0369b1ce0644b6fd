"""Greatest common divisors by Euclid's algorithm, one remainder a step: `gcd(48,18)=?` -> `48%18=12,18%12=6,12%6=0`."""

from __future__ import annotations

from collections.abc import Sequence

from bascule.data import chat
from bascule.data.tasks import gym
from bascule.data.tasks.base import Options, Problem
from bascule.data.tasks.direct import OPTION, answers_directly

_DEFAULTS = {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 99}


class Gcd:
    """Options: reasoning-gym's (`min_numbers`, `max_numbers`, `min_value`, `max_value`) and `direct_ratio`."""

    name = "gcd"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        settings, own = gym.settings(self.name, options, _DEFAULTS, OPTION)

        def convert(entry: gym.Entry) -> Problem:
            numbers = entry["metadata"]["numbers"]
            return Problem(
                task=self.name, question=f"gcd({','.join(map(str, numbers))})=?", answer=entry["answer"],
                key=",".join(map(str, sorted(numbers))), difficulty=len(numbers), metadata={"numbers": numbers, **own},
            )  # fmt: skip

        return gym.distinct(self.name, seed, count, settings, convert)

    def verify(self, problem: Problem, completion_text: str) -> float:
        return gym.verify(self.name, problem, completion_text)

    def verify_many(
        self, problems: Sequence[Problem], completion_texts: Sequence[str]
    ) -> list[float]:
        return gym.verify_many(self.name, problems, completion_texts)

    def trace(self, problem: Problem, key: int) -> str | None:
        first, *rest = problem.metadata["numbers"]
        steps: list[str] = []
        for number in rest:
            more, first = _euclid(first, number)
            steps += more
        return chat.completion(
            "" if answers_directly(problem, key) else ",".join(steps), str(first)
        )


def _euclid(a: int, b: int) -> tuple[list[str], int]:
    a, b = max(a, b), min(a, b)
    steps = []
    while b:
        steps.append(f"{a}%{b}={a % b}")
        a, b = b, a % b
    return steps, a


task = Gcd()
