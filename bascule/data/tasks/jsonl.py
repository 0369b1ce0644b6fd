"""Questions and answers out of the user's own file, one JSON object a line; GSM8K's way of writing answers is understood.

    [[data.tasks]]
    name = "jsonl:data/gsm8k_train.jsonl"
    options = { question = "question", answer = "answer", verify = "math" }

`verify` says when an answer is right: "plain" (default) compares numbers as numbers and text as text; "math" asks math-verify
(pip install 'bascule[math]'), which knows that 1/2, 0.5 and \\frac{1}{2} are one. What stands before `####` in an answer is a worked solution: SFT learns it as the thought. Without it there is nothing for SFT,
and GRPO alone trains on the problem. Which lines are held out depends on data.eval_seed only.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from bascule import draws
from bascule.data import chat
from bascule.data.tasks.base import Options, Problem
from bascule.errors import RecipeError, nearest

PREFIX = "jsonl"
_DEFAULTS = {"question": "question", "answer": "answer", "verify": "plain"}
_RULES = ("plain", "math")
_FINAL = "####"
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes to a calculator


def absolute(name: str) -> str:
    """A task's name with the path in it made absolute; other tasks' names as they are."""
    prefix, _, path = name.partition(":")
    return f"{PREFIX}:{Path(path).absolute()}" if prefix == PREFIX and path else name


@dataclass(frozen=True)
class JsonLines:
    """The task of one file. `name` is what the recipe writes: `jsonl:PATH`."""

    path: str

    @property
    def name(self) -> str:
        return f"{PREFIX}:{self.path}"

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        unknown = sorted(set(options) - set(_DEFAULTS))
        if unknown:
            raise RecipeError(
                f"Task '{self.name}' has no option '{unknown[0]}'; allowed: {', '.join(_DEFAULTS)}."
            )
        fields = {**_DEFAULTS, **{key: str(value) for key, value in options.items()}}
        if fields["verify"] not in _RULES:
            raise RecipeError(
                f"Task '{self.name}': verify = '{fields['verify']}'; allowed: {', '.join(_RULES)}.{nearest(fields['verify'], _RULES)}"
            )
        if fields["verify"] == "math":
            _math_verify()  # refused now, not after hours
        found = _read(self.path, fields["question"], fields["answer"])
        order = draws.permutation(draws.key(seed, "task.jsonl"), len(found))
        return [
            self._problem(question, answer, fields["verify"])
            for question, answer in (found[i] for i in order[:count])
        ]

    def _problem(self, question: str, answer: str, rule: str) -> Problem:
        worked, _, final = answer.rpartition(_FINAL)
        return Problem(
            task=self.name, question=question, answer=final.strip(), key=" ".join(question.split()), difficulty=len(worked.split("\n")),
            metadata={"worked": _CALCULATOR.sub("", worked).strip(), "verify": rule},
        )  # fmt: skip

    def verify(self, problem: Problem, completion_text: str) -> float:
        """Numbers are compared as numbers (`1,000`, `$1000.0`, `1000`), anything else as text without regard to case."""
        parsed = chat.parse_strict(completion_text)
        if parsed is None:
            return 0.0
        if problem.metadata["verify"] == "math":
            return 1.0 if _same_mathematics(parsed[1], problem.answer) else 0.0
        said, right = (_plain(text) for text in (parsed[1], problem.answer))
        numbers = _number(said), _number(right)
        same = numbers[0] == numbers[1] if None not in numbers else said == right
        return 1.0 if same else 0.0

    def trace(self, problem: Problem, key: int) -> str | None:
        worked = problem.metadata["worked"]
        return chat.completion(worked, problem.answer) if worked and "<" not in worked else None


@functools.lru_cache(maxsize=8)
def _read(path: str, question: str, answer: str) -> tuple[tuple[str, str], ...]:
    """Distinct (question, answer) of a file, in its order; of a question asked twice the first answer counts."""
    found: dict[str, str] = {}
    try:
        lines = (
            Path(path).read_text(encoding="utf-8-sig").split("\n")
        )  # splitlines() cuts at U+2028, which JSON allows
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"Task '{PREFIX}:{path}': the file cannot be read ({error}). Give the path of a JSON-lines file."
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            asked, right = (_text(entry[field], field) for field in (question, answer))
            found.setdefault(asked.strip(), right)
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"Task '{PREFIX}:{path}': line {number} is no object with '{question}' and '{answer}' ({error!r}). Mend it, or "
                "name the fields in data.tasks.options."
            ) from None
    return tuple(found.items())


def _text(value: Any, field: str) -> str:
    """Text or a number as text. Raises ValueError for what nobody can ask or answer: null, a list, nothing at all."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"'{field}' is {json.dumps(value):.40}, neither text nor a number")
    if chat.HALF_A_CHARACTER.search(str(value)):
        raise ValueError(f"'{field}' holds half of a surrogate pair, which is no text")
    if not str(value).rpartition(_FINAL)[2].strip():
        raise ValueError(f"'{field}' is empty")
    return str(value)


@functools.cache
def _math_verify() -> Any:
    try:
        return importlib.import_module("math_verify")
    except ModuleNotFoundError:
        raise RecipeError(
            "verify = \"math\" was asked; the package math-verify is not installed. pip install 'bascule[math]'."
        ) from None


def _same_mathematics(said: str, right: str) -> bool:
    """math-verify's answer; what takes it more than its five seconds (9^9^9^9) is wrong. Its alarm wants the main thread."""
    library = _math_verify()
    gold, given = (
        library.parse(text if "$" in text or "\\boxed" in text else f"${text.strip()}$")
        for text in (right, said)
    )
    return bool(library.verify(gold, given))


def _plain(text: str) -> str:
    return (
        text.strip()
        .rstrip(".")
        .replace(",", "")
        .replace("$", "")
        .replace("\u2212", "-")
        .strip()
        .casefold()
    )


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text) if len(text) <= 40 and "e" not in text else None
    except (ValueError, ZeroDivisionError):
        return None
