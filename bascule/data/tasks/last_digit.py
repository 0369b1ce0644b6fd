"""The last digit of a sum: `(7+8+3+9)%10=?` -> `7+8=5,5+3=8,8+9=7`. A hundred facts, learnt soon; at once it can only be guessed.

Without its steps the answer depends on every term at once (a parity of ten), which small models do not learn: ten answers are as
good as each other. So the task parts what a model can from what it does.
"""

from __future__ import annotations

from bascule import draws
from bascule.data import chat
from bascule.data.tasks.base import Options, Problem
from bascule.data.tasks.direct import OPTION, answers_directly
from bascule.errors import RecipeError, nearest

_DEFAULTS: dict[str, int | float] = {"min_terms": 4, "max_terms": 6, **OPTION}
_DRAWS_PER_PROBLEM = 3


class LastDigit:
    """Options: `min_terms`, `max_terms` (one-digit terms of a sum) and `direct_ratio`."""

    name = "last_digit"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        low, high, ratio = _checked(options)
        found: dict[str, Problem] = {}
        for index in range(_DRAWS_PER_PROBLEM * count + 64):
            if len(found) >= count:
                break
            key = draws.key(seed, "task.last_digit", index)
            size = low + int(draws.integers(key, high - low + 1, 1)[0])
            digits = draws.integers(draws.key(key, "digits"), 10, size).tolist()
            terms = "+".join(map(str, digits))
            found[terms] = Problem(
                task=self.name, question=f"({terms})%10=?", answer=str(sum(digits) % 10), key=terms, difficulty=size,
                metadata={"digits": digits, "direct_ratio": ratio},
            )  # fmt: skip
        return list(found.values())

    def verify(self, problem: Problem, completion_text: str) -> float:
        parsed = chat.parse_strict(completion_text)
        return 1.0 if parsed is not None and parsed[1] == problem.answer else 0.0

    def trace(self, problem: Problem, key: int) -> str | None:
        total, *rest = problem.metadata["digits"]
        steps = []
        for digit in rest:
            steps.append(f"{total}+{digit}={(total + digit) % 10}")
            total = (total + digit) % 10
        thought = "" if answers_directly(problem, key) else ",".join(steps)
        return chat.completion(thought, problem.answer)


def _checked(options: Options) -> tuple[int, int, float]:
    """(fewest terms, most terms, share of direct answers). Raises RecipeError."""
    for name, value in options.items():
        if name not in _DEFAULTS:
            allowed = ", ".join(sorted(_DEFAULTS))
            raise RecipeError(
                f"Task 'last_digit' has no option '{name}'; allowed: {allowed}.{nearest(name, _DEFAULTS)}"
            )
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (name in OPTION and isinstance(value, float)):
            kind = "float" if name in OPTION else "int"
            raise RecipeError(f"Task 'last_digit': option {name}={value!r} must be {kind}.")
    found = {**_DEFAULTS, **options}
    low, high = int(found["min_terms"]), int(found["max_terms"])
    if not 2 <= low <= high:
        raise RecipeError(
            f"Task 'last_digit': min_terms={low} and max_terms={high} must satisfy 2 <= min_terms <= max_terms."
        )
    return low, high, float(found["direct_ratio"])


task = LastDigit()
