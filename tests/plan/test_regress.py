"""The regression: exact where it can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bascule.plan.regress import Point, Process, Term, distrusting
from bascule.plan.sizes import _Layout, density, fit_sizes


def process(targets: list[float], noise: float = 0.1) -> Process:
    points = tuple(
        Point({"kind": "a", "chip": chip}, (float(i),), (0.0,), family=chip, name=str(i))
        for i, chip in enumerate("xxy")
    )
    return Process(
        points,
        np.array(targets),
        (Term(()), Term(("chip",))),
        np.array([0.2, 0.3]),
        np.array([1.0]),
        np.array([1.0]),
        {"a": noise},
    )


def test_leaving_out_in_closed_form_equals_leaving_out_for_real() -> None:
    whole = process([0.3, 0.5, -0.2])
    mean, sd = whole.left_out()
    rest = replace(whole, points=whole.points[2:], targets=whole.targets[2:])
    real_mean, real_sd = rest.predict(whole.points[:2])
    assert mean[:2] == pytest.approx(real_mean)
    assert sd[:2] == pytest.approx(real_sd)


def test_a_chip_with_runs_is_known_better_than_one_without() -> None:
    whole = process([0.3, 0.5, -0.2])
    known, unknown = (Point({"kind": "a", "chip": chip}, (9.0,), (0.0,)) for chip in "xz")
    mean, sd = whole.predict([known, unknown])
    assert sd[0] < sd[1]
    assert mean[0] > mean[1]


def test_uncertain_constants_widen_what_leans_on_them() -> None:
    whole = process([0.0, 0.0, 0.0])
    steep, flat = (Point({"kind": "a", "chip": "z"}, (0.0,), (slope,)) for slope in (1.0, 0.0))
    _, sd = whole.predict([steep, flat])
    assert sd[0] ** 2 - sd[1] ** 2 == pytest.approx(1.0)


def test_a_run_that_misses_what_all_others_say_teaches_less() -> None:
    alike = [
        Point({"kind": "a", "chip": "x"}, (0.1 * n,), (0.0,), f"f{n}", f"n{n}") for n in range(8)
    ]
    targets = [0.3, 0.31, 0.29, 0.3, 2.5, 0.3, 0.31, 0.29]
    odd = replace(process([0.3, 0.5, -0.2]), points=tuple(alike), targets=np.array(targets))
    wiser = distrusting(odd)
    assert wiser.points[4].noise > 3 * wiser.points[0].noise
    new = Point({"kind": "a", "chip": "x"}, (0.45,), (0.0,))
    assert abs(wiser.predict([new])[0][0] - 0.3) < abs(odd.predict([new])[0][0] - 0.3) / 2


def test_the_slope_of_the_density_is_what_small_steps_find() -> None:
    words = [("x", "u"), ("x", "v"), ("y", "u"), ("y", "v"), ("x", "u")]
    points = tuple(
        Point({"kind": stack, "chip": chip}, (0.7 * i, i % 2), (0.3 * i - 0.5,), chip, str(i))
        for i, (chip, stack) in enumerate(words)
    )
    terms = (Term(()), Term(("chip",), "constants"), Term((), "near"), Term(("kind",), "near"))
    numbers = [np.array(one) for one in ([0.2, 0.3, 0.25, 0.15], [1.0, 0.6], [0.4])]
    targets = np.array([0.3, 0.5, -0.2, 0.1, 0.9])
    whole = Process(points, targets, terms, *numbers, {"u": 0.1, "v": 0.2})
    place = _Layout.of(whole)
    theta = place.pack(whole)
    _, slope = density(whole, whole.parts)
    for index in range(len(theta)):
        up, down = (
            density(place.unpack(theta + step * np.eye(len(theta))[index], whole), whole.parts)[0]
            for step in (1e-5, -1e-5)
        )
        assert slope[index] == pytest.approx((up - down) / 2e-5, abs=1e-6)
    assert density(fit_sizes(whole, rounds=8), whole.parts)[0] > density(whole, whole.parts)[0]
