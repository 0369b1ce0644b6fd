"""What a rollout's rewards cost: every answer by itself, the whole batch in one call (what tasks do), and the batch in NumPy's strings.

    python benchmarks/train/verifiers.py

256 completions of chain_sum (the demo's rollout), half of them wrong, one thread. Paired: the ways alternate, CPU time, medians. All
must first give the same rewards, odd answers included. A batch that knows no problem twice: nothing is saved by remembering.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from bascule.data import chat
from bascule.data.tasks import registry
from bascule.data.tasks.base import Problem

ROLLOUT, REPEATS = 256, 31
ODD = ("+7", "007", "1,000", "-0", "nan", "7 ", "")


def one_by_one(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    return [registry.verify(*pair) for pair in zip(problems, texts, strict=True)]


def in_numpy(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """Whole arrays of strings: the form, the answer, is it a plain number, is it the right one. The rest one by one."""
    form_N3 = np.char.partition(np.array(texts), chat.THINK_CLOSE)
    head_N, said_N = form_N3[:, 0], form_N3[:, 2]
    right_N = np.array([problem.answer for problem in problems])
    strict_N = np.char.startswith(head_N, chat.THINK_OPEN) & (np.char.count(texts, "<") == 2)
    digits_N = np.char.lstrip(said_N, "-")
    plain_N = np.char.isdigit(digits_N) & (np.char.str_len(said_N) - np.char.str_len(digits_N) < 2)
    plain_N &= ~np.char.startswith(digits_N, "0") | (said_N == "0")
    rewards = (strict_N & plain_N & (said_N == right_N)).astype(float)
    for place in np.flatnonzero(strict_N & ~plain_N):
        rewards[place] = registry.verify(problems[place], texts[place])
    return [float(reward) for reward in rewards]


def main() -> None:
    task = registry.get("chain_sum")
    problems = task.problems(1, ROLLOUT, {"min_terms": 4, "max_terms": 5})
    traces = [str(task.trace(problem, 1)) for problem in problems]
    texts = [text + "1" * (place % 2) for place, text in enumerate(traces)]
    ways: dict[str, Callable[[Sequence[Problem], Sequence[str]], list[float]]] = {
        "one by one": one_by_one, "one call": registry.verify_many, "NumPy strings": in_numpy,
    }  # fmt: skip
    odd = [chat.completion("so", said) for said in ODD] + texts[len(ODD) :]
    for batch in (texts, odd):
        answers = [way(problems, batch) for way in ways.values()]
        assert all(answer == answers[0] for answer in answers), "the ways differ"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            began = time.thread_time()
            way(problems, texts)
            seconds[name].append(time.thread_time() - began)
    slow = statistics.median(seconds["one by one"])
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"{name:14} {middle * 1e3:7.2f} ms a rollout of {ROLLOUT}, {slow / middle:5.1f}x")


if __name__ == "__main__":
    main()
