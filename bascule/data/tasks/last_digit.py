"""The last digits of some sums: `7+8+3,4+6+9 mod 10=?` -> `7+8=5,5+3=8,4+6=0,0+9=9` and `89`. A hundred facts, learnt soon.

Without its steps a digit depends on every term at once (a parity of ten), which small models do not learn: at once the answer can
only be guessed, one try in 10 to the number of sums. So the task parts what a model can do from what it does.
"""

from __future__ import annotations

from bascule import draws
from bascule.data import chat
from bascule.data.tasks.base import Options, Problem
from bascule.data.tasks.direct import OPTION, answers_directly
from bascule.errors import RecipeError, nearest

_DEFAULTS: dict[str, int | float] = {"sums": 2, "min_terms": 3, "max_terms": 4, **OPTION}
_DRAWS_PER_PROBLEM = 3


class LastDigit:
    """Options: `sums` of one question, `min_terms` and `max_terms` of each (one-digit), and `direct_ratio`."""

    name = "last_digit"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        found_options = _checked(options)
        found: dict[str, Problem] = {}
        for index in range(_DRAWS_PER_PROBLEM * count + 64):
            if len(found) >= count:
                break
            problem = _drawn(draws.key(seed, "task.last_digit", index), found_options)
            found.setdefault(problem.key, problem)
        return list(found.values())

    def verify(self, problem: Problem, completion_text: str) -> float:
        parsed = chat.parse_strict(completion_text)
        return 1.0 if parsed is not None and parsed[1] == problem.answer else 0.0

    def trace(self, problem: Problem, key: int) -> str | None:
        steps = [step for terms in problem.metadata["sums"] for step in _worked(terms)]
        thought = "" if answers_directly(problem, key) else ",".join(steps)
        return chat.completion(thought, problem.answer)


def _drawn(key: int, options: dict[str, int | float]) -> Problem:
    low, high = int(options["min_terms"]), int(options["max_terms"])
    sizes = low + draws.integers(key, high - low + 1, int(options["sums"]))
    digits = iter(draws.integers(draws.key(key, "digits"), 10, int(sizes.sum())).tolist())
    sums = [[next(digits) for _ in range(size)] for size in sizes]
    text = ",".join("+".join(map(str, terms)) for terms in sums)
    return Problem(
        task=LastDigit.name, question=f"{text} mod 10=?", answer="".join(str(sum(terms) % 10) for terms in sums), key=text,
        difficulty=int(sizes.sum()), metadata={"sums": sums, "direct_ratio": options["direct_ratio"]},
    )  # fmt: skip


def _worked(terms: list[int]) -> list[str]:
    """[7, 8, 3] -> ["7+8=5", "5+3=8"]."""
    total, *rest = terms
    steps = []
    for digit in rest:
        steps.append(f"{total}+{digit}={(total + digit) % 10}")
        total = (total + digit) % 10
    return steps


def _checked(options: Options) -> dict[str, int | float]:
    """Every option, defaults filled in. Raises RecipeError."""
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
    found = {**_DEFAULTS, **{name: value for name, value in options.items() if not isinstance(value, str)}}  # fmt: skip
    if not (found["sums"] >= 1 and 2 <= found["min_terms"] <= found["max_terms"]):
        raise RecipeError(
            f"Task 'last_digit': sums={found['sums']}, min_terms={found['min_terms']} and max_terms={found['max_terms']} must satisfy "
            "1 <= sums and 2 <= min_terms <= max_terms."
        )
    return found


task = LastDigit()
