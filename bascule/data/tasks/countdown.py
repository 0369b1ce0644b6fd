"""Countdown: reach a target with all the given numbers, each used once. The solver searches and shows its failed tries.

3,5,7:26  ->  <think>5+3=8,8*7=56x
              7*3=21,21+5=26ok</think>(7*3)+5
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from bascule import draws
from bascule.data import chat
from bascule.data.tasks import gym, scorer
from bascule.data.tasks.base import Options, Problem
from bascule.data.tasks.direct import OPTION, answers_directly
from bascule.errors import RecipeError

_DEFAULTS = {
    "min_numbers": 3,
    "max_numbers": 3,
    "min_value": 1,
    "max_value": 9,
    "min_target": 1,
    "max_target": 49,
}
_OWN = {**OPTION, "operators": "+-*", "max_tries": 4}
_MAX_EXPRESSION = 96
_DRAWS_PER_TRY = (
    8  # the solver does not repeat a try; where few different ones exist it stops looking
)
_PLAIN = re.compile(r"[0-9+\-*/() ]+")

Number = tuple[int, str]  # a value, and the expression that made it


class Countdown:
    """Options: reasoning-gym's (`min_numbers`, `max_value`, `max_target`, ...), `operators` as one word such as "+-*",
    `max_tries` (attempts the solver may show), `direct_ratio`."""

    name = "countdown"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        settings, own = gym.settings(self.name, options, _DEFAULTS, _OWN)
        operators = own["operators"]
        if not operators or set(operators) - set("+-*/"):
            raise RecipeError(
                f"Task 'countdown': operators='{operators}' must be one or more of '+-*/' written as one word."
            )

        def convert(entry: gym.Entry) -> Problem:
            numbers, target = entry["metadata"]["numbers"], entry["metadata"]["target"]
            return Problem(
                task=self.name, question=f"{','.join(map(str, numbers))}:{target}", answer=entry["answer"],
                key=f"{','.join(map(str, sorted(numbers)))}:{target}", difficulty=len(numbers),
                metadata={"numbers": numbers, "target": target, **own},
            )  # fmt: skip

        return gym.distinct(
            self.name, seed, count, {**settings, "operators": tuple(operators)}, convert
        )

    def verify(self, problem: Problem, completion_text: str) -> float:
        """reasoning-gym's scorer hands the answer to sympy, which evaluates it: only short plain arithmetic that already
        equals the target gets that far, so nothing is executed and `9**9**9` cannot stop the run."""
        parsed = chat.parse_strict(completion_text)
        if parsed is None or _value(parsed[1]) != problem.metadata["target"]:
            return 0.0
        return _reward(parsed[1], problem)

    def trace(self, problem: Problem, key: int) -> str | None:
        rng = draws.generator(draws.key(key, "task.countdown"))
        target, limit = problem.metadata["target"], int(problem.metadata["max_tries"])
        tried: dict[str, str] = {}
        for _ in range(_DRAWS_PER_TRY * limit):
            steps, value, expression = _attempt(problem, rng)
            if expression in tried:
                continue
            tried[expression] = f"{','.join(steps)}{'ok' if value == target else 'x'}"
            if value == target:
                return chat.completion(
                    "" if answers_directly(problem, key) else "\n".join(tried.values()), expression
                )
            if len(tried) == limit:
                return None
        return None


def _attempt(problem: Problem, rng: np.random.Generator) -> tuple[list[str], int, str]:
    """Combine random pairs until one number is left: (written steps, its value, its expression)."""
    pool: list[Number] = [(number, str(number)) for number in problem.metadata["numbers"]]
    steps: list[str] = []
    while len(pool) > 1:
        i, j = sorted(rng.choice(len(pool), 2, replace=False).tolist(), reverse=True)
        one, other = pool.pop(i), pool.pop(j)
        step, made = _combine(one, other, problem.metadata["operators"], rng)
        steps.append(step)
        pool.append(made)
    return steps, pool[0][0], pool[0][1]


def _combine(
    one: Number, other: Number, operators: str, rng: np.random.Generator
) -> tuple[str, Number]:
    """Larger number first, so nothing is negative and mirror images are one try; division only where it is exact."""
    (a, left), (b, right) = sorted((one, other), reverse=True)
    possible = [
        operator for operator in operators if operator != "/" or (b != 0 and a % b == 0)
    ] or ["+"]
    operator = possible[int(rng.integers(len(possible)))]
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[operator]
    return f"{a}{operator}{b}={value}", (value, f"{_wrap(left)}{operator}{_wrap(right)}")


def _wrap(expression: str) -> str:
    return expression if expression.isdigit() else f"({expression})"


@functools.lru_cache(maxsize=65536)
def _value(expression: str) -> Fraction | None:
    """Exact value of plain arithmetic with + - * / and parentheses; None for anything else."""
    if (
        len(expression) > _MAX_EXPRESSION
        or not _PLAIN.fullmatch(expression)
        or "**" in expression
        or "//" in expression
    ):
        return None
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, TypeError, RecursionError, MemoryError):
        return None


_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    raise TypeError(f"not plain arithmetic: {ast.dump(node)}")


@functools.lru_cache(maxsize=65536)
def _reward(answer: str, problem: Problem) -> float:
    """The scorer costs 0.4 ms through sympy; the same answer to the same problem is asked many times within a run."""
    return 1.0 if scorer.right("countdown", answer, problem) else 0.0


task = Countdown()
