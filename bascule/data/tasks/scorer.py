"""reasoning-gym's scorers, before a model that says anything at all. Seen in 0.1.25: some raise on answers they did not expect, some
evaluate the answer and would work at 9**9**9**9 for ever, `complex_arithmetic` pays "nan", and `game_of_life_halting` pays any
nonsense where the right answer is False. Here each of these earns nothing.
"""

from __future__ import annotations

import functools
import re
import signal
import threading
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bascule.data.tasks import gym_datasets
from bascule.data.tasks.base import Problem

LIMIT_S = 5.0
"""Processor time for one answer: a thousand times what a sound one takes. Not wall time, which would make rewards depend on the load."""

NONSENSE = "no answer"
_NOT_A_NUMBER = re.compile(r"\bnan\b", re.IGNORECASE)
_TRIPPED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError, SyntaxError, TypeError, ValueError,
    tokenize.TokenError,
)  # fmt: skip


class _TooLongError(RuntimeError):
    pass


def right(name: str, answer: str, problem: Problem) -> bool:
    """Does dataset `name` give `answer` its full score (partial credit below 1 exists)?"""
    if _NOT_A_NUMBER.search(answer) and not _NOT_A_NUMBER.search(problem.answer):
        return False
    if not _pays(name, answer, problem):
        return False
    return answer.strip() == problem.answer.strip() or not _pays(name, NONSENSE, problem)


def _pays(name: str, answer: str, problem: Problem) -> bool:
    entry = {
        "question": problem.question,
        "answer": problem.answer or None,
        "metadata": dict(problem.metadata),
    }
    try:
        with _limited():
            return float(_scorer(name).score_answer(answer, entry)) == 1.0
    except _TRIPPED:
        return False  # a scorer that trips over an answer has not called it right


@contextmanager
def _limited() -> Iterator[None]:
    """Raises _TooLongError inside when LIMIT_S are used up. Signals reach the main thread only; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


@functools.cache
def _scorer(name: str) -> Any:
    return gym_datasets.create(name, seed=0, size=1)
