"""pass@k is the unbiased estimate, and only finished answers can be right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

from bascule.infer.evaluate import Score, evaluate, majority, pass_at_k, wilson
from bascule.infer.samples import Sample, SampleStore
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
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        group_size: int = 1,
        first_index: int = 0,
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


def sample(number: int, answer: str, *, right: bool, finish: str = "stop") -> Sample:
    return Sample(0, number, finish, right, answer, [])


def test_a_majority_is_right_when_its_commonest_answer_is_and_a_tie_is_split() -> None:
    two_to_one = [
        sample(0, "5", right=True),
        sample(1, "5", right=True),
        sample(2, "6", right=False),
    ]
    assert majority(two_to_one) == 1.0
    assert majority(two_to_one[1:]) == 0.5
    assert majority([sample(0, "", right=False, finish="length"), *two_to_one[2:]]) == 0.0
    assert majority([]) == 0.0


def test_the_interval_is_wilsons_and_is_never_empty() -> None:
    low, high = wilson(0.8, 10)  # Newcombe 1998, table I: 8 of 10
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(1.0, 20)[0] < 0.9 and wilson(0.0, 20)[1] > 0.1 and wilson(0.0, 0) == (0.0, 1.0)


class Counting:
    """An engine whose answer is the number of the draw; it dies when it is asked too often."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        group_size: int = 1,
        first_index: int = 0,
    ) -> list[Completion]:
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        return [
            Completion([first_index + i, 2], [0.0, 0.0], "stop")
            for i in range(len(prompts) * group_size)
        ]


def test_an_interrupted_evaluation_goes_on_with_the_draws_it_would_have_had(tmp_path: Path) -> None:
    def ask(calls: int, path: Path) -> tuple[Counting, Score]:
        engine = Counting(calls)
        return engine, evaluate(
            engine, [[1]] * 70, lambda at, tokens: float(tokens[0] % 3 == 0), samples=2, max_tokens=2, seed=0,
            answer=lambda tokens: str(tokens[0]), store=SampleStore(path),
        )  # fmt: skip

    torn = tmp_path / "torn.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(2, torn)
    text = torn.read_text()
    torn.write_text(text[:-20])  # killed while it wrote
    engine, resumed = ask(99, torn)
    whole_engine, whole = ask(99, tmp_path / "whole.jsonl")
    assert resumed == whole and engine.calls > whole_engine.calls
    assert sorted(torn.read_text().splitlines()) == sorted(
        (tmp_path / "whole.jsonl").read_text().splitlines()
    )
    again, same = ask(0, torn)  # nothing is left to ask
    assert same == whole and again.calls == 0
