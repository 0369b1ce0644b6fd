"""The convergence test: right on textbook figures, right in its error rates, honest when it cannot know."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bascule.qualify import equivalence
from bascule.qualify.equivalence import compare, power, runs_needed, t_cdf, t_quantile


@pytest.mark.parametrize(
    ("p", "freedom", "t"),
    [
        (0.95, 1, 6.3138),
        (0.95, 10, 1.8125),
        (0.975, 5, 2.5706),
        (0.95, 18, 1.7341),
        (0.995, 30, 2.7500),
        (0.95, 1000, 1.6464),
    ],
)
def test_students_t_agrees_with_the_tables(p: float, freedom: float, t: float) -> None:
    assert t_quantile(p, freedom) == pytest.approx(t, abs=2e-4)
    assert t_cdf(t, freedom) == pytest.approx(p, abs=2e-5)
    assert t_cdf(-t, freedom) == pytest.approx(1 - p, abs=2e-5)


@pytest.mark.parametrize(
    ("spread", "margin", "paired", "runs"),
    [(0.0035, 0.005, False, 10), (0.005, 0.01, False, 6), (0.0035, 0.005, True, 6)],
)
def test_runs_needed_agree_with_published_simulation(
    spread: float, margin: float, paired: bool, runs: int
) -> None:
    assert runs_needed(spread, margin, paired=paired) == pytest.approx(runs, abs=1)


def groups(
    seed: int, count: int, runs: int, spread: float, shift: float
) -> list[equivalence.Equivalence]:
    generator = np.random.default_rng(seed)
    return [
        compare(
            generator.normal(shift, spread, runs).tolist(),
            generator.normal(0.0, spread, runs).tolist(),
        )
        for _ in range(count)
    ]


def share(results: list[equivalence.Equivalence], answer: str) -> float:
    return sum(result.answer == answer for result in results) / len(results)


def test_equal_groups_are_called_equal_as_often_as_the_power_says() -> None:
    results = groups(1, 400, 10, 0.0035, 0.0)
    error = 0.0035 * math.sqrt(2 / 10)
    assert share(results, "equal") == pytest.approx(power(error, 18, 0.005), abs=0.05)
    assert share(results, "different") <= 0.02


def test_groups_that_differ_by_the_margin_are_called_equal_in_at_most_five_percent() -> None:
    assert share(groups(2, 400, 10, 0.0035, 0.005), "equal") <= 0.075


def test_groups_that_differ_by_three_margins_are_called_different() -> None:
    results = groups(3, 100, 10, 0.0035, 0.015)
    assert share(results, "different") > 0.99
    assert share(results, "equal") == 0.0


def test_few_noisy_runs_give_the_third_answer_and_the_number_needed() -> None:
    result = compare([2.000, 2.020, 1.985], [2.010, 1.990, 2.004])
    assert result.answer == "too few runs"
    assert result.runs_needed is not None and result.runs_needed > 3
    assert str(result.runs_needed) in result.sentence()


def test_pairing_sees_what_spread_between_runs_hides() -> None:
    a = [2.00, 2.10, 1.95, 2.05]
    b = [value + 0.0001 * sign for value, sign in zip(a, (1, -1, 1, -1), strict=True)]
    assert compare(a, b, paired=True).answer == "equal"
    assert compare(a, b).answer == "too few runs"


def test_identical_pairs_are_equal_and_a_constant_shift_is_different() -> None:
    assert compare([1.0, 1.1], [1.0, 1.1], paired=True).answer == "equal"
    assert compare([1.02, 1.12], [1.0, 1.1], paired=True).answer == "different"


def test_a_single_run_never_proves_anything() -> None:
    assert compare([1.0], [1.0]).answer == "too few runs"
    assert compare([1.0], [5.0]).answer == "too few runs"


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        compare([1.0, math.nan], [1.0, 1.0])
