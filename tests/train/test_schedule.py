from __future__ import annotations

import pytest

from bascule.train.schedule import linear


def test_warmup_rises_to_the_peak_then_the_line_falls_to_final():
    factors = [linear(i, 10, warmup=2, final=0.0) for i in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors == sorted(factors[:2]) + sorted(factors[2:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 8)


def test_final_is_a_floor_and_no_warmup_starts_at_the_peak():
    assert linear(0, 4, warmup=0, final=0.1) == 1.0
    assert linear(4, 4, warmup=0, final=0.1) == pytest.approx(0.1)
    assert linear(9, 4, warmup=0, final=0.1) == pytest.approx(0.1)
