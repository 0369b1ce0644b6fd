"""Traces without a thought. A recipe may ask for a share of them (`direct_ratio`); their answers are right all the same.

They give GRPO something to decide: whether to think. Whoever shows a gain from such a start must say that the share was put
there on purpose.
"""

from __future__ import annotations

from bascule import draws
from bascule.data.tasks.base import Problem

OPTION: dict[str, float] = {"direct_ratio": 0.0}


def answers_directly(problem: Problem, key: int) -> bool:
    """Whether the trace drawn with `key` leaves its thought empty."""
    ratio = float(problem.metadata["direct_ratio"])
    return ratio > 0.0 and draws.number(draws.key(key, "task.direct")) < ratio
