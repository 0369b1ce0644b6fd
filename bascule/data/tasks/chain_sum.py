"""Chains of additions and subtractions: `9-8+0+7=?`, solved from the left with every partial sum written down."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bascule import draws
from bascule.data import chat
from bascule.data.tasks import gym
from bascule.data.tasks.base import Options, Problem
from bascule.data.tasks.direct import OPTION, answers_directly

_OWN = {**OPTION, "lost_sign_ratio": 0.0}
_DEFAULTS = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}
_TERM = re.compile(r"([+-]?)(-?\d+)")


class ChainSum:
    """Options: reasoning-gym's (`min_terms`, `max_terms`, `min_digits`, `max_digits`, `allow_negation`), `direct_ratio`, and
    `lost_sign_ratio`: the share of negative partial sums whose minus sign the worked examples lose, going on from there, as from a teacher
    with a bad habit. The corpus leaves wrong examples out unless the recipe says `data.verify_solutions = false`."""

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

    def verify_many(
        self, problems: Sequence[Problem], completion_texts: Sequence[str]
    ) -> list[float]:
        return gym.verify_many(self.name, problems, completion_texts)

    def trace(self, problem: Problem, key: int) -> str | None:
        steps, total = _work_through(problem, key)
        return chat.completion(
            "" if answers_directly(problem, key) else ",".join(steps), str(total)
        )


def _work_through(problem: Problem, key: int) -> tuple[list[str], int]:
    """("9-8+0" -> ["9-8=1", "1+0=1"], 1), with the signs lost that the trace drawn with `key` loses."""
    (_, first), *rest = _TERM.findall(problem.metadata["expression"])
    lost, ratio = [False] * len(rest), problem.metadata["lost_sign_ratio"]
    if ratio > 0.0:
        lost = (draws.uniform(draws.key(key, "task.sign"), (len(rest),)) < ratio).tolist()
    total, steps = int(first), []
    for (operator, number), loses in zip(rest, lost, strict=True):
        new = total + int(number) if operator == "+" else total - int(number)
        new = abs(new) if loses else new
        steps.append(f"{total}{operator}{number}={new}")
        total = new
    return steps, total


task = ChainSum()
