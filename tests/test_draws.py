"""Random numbers are pure functions of where they are used."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bascule import draws


def test_a_number_does_not_depend_on_how_many_were_drawn_before() -> None:
    key = draws.key(7, "sampling", 12)
    assert np.array_equal(draws.uniform(key, (100,))[40:50], draws.uniform(key, (10,), start=40))


def test_purposes_and_steps_are_independent() -> None:
    streams = [
        draws.uniform(draws.key(7, purpose, step), (4000,))
        for purpose in ("a", "b")
        for step in (1, 2)
    ]
    correlation = np.corrcoef(streams) - np.eye(4)
    assert np.abs(correlation).max() < 0.06


def test_uniform_numbers_are_uniform_and_never_zero_or_one() -> None:
    numbers = draws.uniform(draws.key(1, "x"), (200_000,))
    assert numbers.min() > 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_the_numbers_of_today_stay_the_numbers_of_tomorrow() -> None:
    """A change of the generator breaks every resumed run; if this fails, a version of the run format must say so."""
    key = draws.key(3, "sft.batch", 9)
    assert key == 17679812592775731772
    assert draws.uniform(key, (3,)).tolist() == [
        0.6703282231606882,
        0.24099970021856149,
        0.8938814162346627,
    ]
    assert draws.permutation(draws.key(0, "p"), 8).tolist() == [0, 7, 1, 5, 4, 3, 2, 6]


@given(st.integers(0, 2**64 - 1))
def test_one_number_is_the_first_of_many(key: int) -> None:
    assert draws.number(key) == draws.uniform(key, (1,))[0] == draws.uniform(key, (7,))[0]
