"""pass@k is the unbiased estimate, and only finished answers can be right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest

from bascule.infer.evaluate import evaluate, pass_at_k
from bascule.infer.sampling import Sampling
from bascule.infer.sequence import Completion


@pytest.mark.parametrize(
    ("samples", "right", "k"), [(5, 2, 1), (5, 2, 3), (8, 0, 8), (8, 8, 1), (6, 5, 2)]
)
def test_pass_at_k_is_the_share_of_all_choices_of_k(samples: int, right: int, k: int) -> None:
    draws = list(combinations(range(samples), k))
    share = sum(any(one < right for one in draw) for draw in draws) / len(draws)
    assert pass_at_k(samples, right, k) == pytest.approx(share)


class Scripted:
    """Problem 0 is right in 1 of 2 samples, problem 1 is right but never ends."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, group_size: int = 1
    ) -> list[Completion]:
        one = [Completion([7, 2], [0.0, 0.0], "stop"), Completion([8, 2], [0.0, 0.0], "stop")][
            :group_size
        ]
        return one + [Completion([7, 7], [0.0, 0.0], "length")] * group_size


def test_scores_are_whole_numbers_one_can_check_by_hand() -> None:
    score = evaluate(
        Scripted(),
        [[1], [2]],
        lambda at, tokens: float(tokens[0] == 7),
        samples=2,
        max_tokens=2,
        seed=0,
        ks=(1, 2, 8),
    )
    assert (score.pass_at, score.greedy, score.truncated_ratio) == ({1: 0.25, 2: 0.5}, 0.5, 0.5)
