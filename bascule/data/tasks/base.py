"""What a task is: problems with one canonical key each, an exact verifier, and a solver that shows its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Options = Mapping[str, int | float | str | bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question. Two problems are the same problem exactly when (task, key) agree, however the question is worded.

    `answer` is one right answer (countdown has many); `difficulty` counts the task's own units (terms, numbers, words).
    `metadata` is what the verifier and the solver need, plain JSON values.
    """

    task: str
    question: str
    answer: str
    key: str
    difficulty: int
    metadata: Mapping[str, Any] = field(compare=False, repr=False)


@runtime_checkable
class Task(Protocol):
    """A family of problems. All three methods are pure functions of their arguments."""

    @property
    def name(self) -> str: ...

    def problems(self, seed: int, count: int, options: Options) -> list[Problem]:
        """At most `count` problems, all keys distinct; fewer when the family is smaller than that.

        Raises RecipeError for an option that the family does not have.
        """
        ...

    def verify(self, problem: Problem, completion_text: str) -> float:
        """1.0 when the text is one thought and then a right answer, else 0.0."""
        ...

    def trace(self, problem: Problem, key: int) -> str | None:
        """A worked solution `<think>steps</think>answer`, a pure function of `key`; None when the solver found nothing."""
        ...


@runtime_checkable
class VerifiesMany(Protocol):
    """What a task may offer beside: all answers of a batch at once. A task without it is asked one by one (registry.verify_many)."""

    def verify_many(
        self, problems: Sequence[Problem], completion_texts: Sequence[str]
    ) -> Sequence[float]:
        """The rewards that `verify` gives, in the same order: not another rule, only another way to it."""
        ...
