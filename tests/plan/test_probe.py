"""The quick look at this machine's speed."""

from __future__ import annotations

import pytest
from threadpoolctl import threadpool_info

from bascule.plan import probe


def test_the_machine_is_timed_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads on busy cores wait for time slices: the demo was once priced at 22 hours for its 5 minutes."""
    threads: list[int] = []
    timed = probe._matmul_rate

    def watched(rows: int, width: int, budget_s: float) -> float:
        threads.extend(one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas")
        return timed(rows, width, budget_s)

    monkeypatch.setattr(probe, "_matmul_rate", watched)
    speed = probe.measure_cpu.__wrapped__(0.02)
    assert threads and set(threads) == {1}
    assert speed.warm_flops_per_s > 1e8 and speed.cold_flops_per_s > 1e8
