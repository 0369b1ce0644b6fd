"""Time that the host's scheduler gave to others is known, so that it is not held against the chip."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from types import ModuleType

import pytest

from bascule.guard import host


@pytest.mark.skipif(not host.SCHEDULER.exists(), reason="this system does not tell")
def test_waiting_for_a_core_counts_and_sleeping_does_not() -> None:
    before = host.withheld_s()
    time.sleep(0.2)
    assert host.withheld_s() - before < 0.19
    rivals = []
    core = {min(os.sched_getaffinity(0))}
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, core)
        for _ in range(2):
            child = os.fork()
            if child == 0:
                end = time.monotonic() + 20
                while time.monotonic() < end:
                    pass
                os._exit(0)
            rivals.append(child)
        before, start = host.withheld_s(), time.monotonic()
        while host.withheld_s() - before < 0.05 and time.monotonic() - start < 15:
            pass
        assert host.withheld_s() - before >= 0.05
    finally:
        for child in rivals:
            os.kill(child, 9)
            os.waitpid(child, 0)
        os.sched_setaffinity(0, mine)


def test_where_the_system_does_not_tell_nothing_is_withheld(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "SCHEDULER", tmp_path / "nowhere")
    assert host.withheld_s() == 0.0


@pytest.mark.parametrize(("fetched", "known"), [(0, True), (1, False)])
def test_a_step_that_waited_for_pages_is_not_judged_by_its_time(
    tmp_path: Path, guarded: ModuleType, monkeypatch: pytest.MonkeyPatch, fetched: int, known: bool
) -> None:
    counts = itertools.count(step=fetched)
    monkeypatch.setattr(host, "pages_fetched", lambda: next(counts) if fetched else 0)
    monkeypatch.setattr(host, "withheld_s", lambda: 0.0)
    rig = guarded.rig(tmp_path)
    rig.stepper.begin(rig.objective)
    proposal = rig.stepper.propose(rig.objective.next_batch(1))
    assert (rig.guard._seen(proposal).own_seconds > 0) is known
