"""Whatever faults, kills and disk errors come in whatever order: a run ends with the undisturbed run's bits, or stops and says why."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from bascule.ledger import Ledger, of_kind, read_ledger
from bascule.records import AnyRecord, Incident, RunFinished
from tests import in_process

STEPS = 9
FAULTS = (
    "zeroed", "bit-flip:low", "nan", "transient", "device-error", "oom", "missing-backward-op", "softmax-0.99", "bit-rot:high", "doubled-gradient",
)  # fmt: skip
STOPS = {4, 5, 6}  # the guard stopped the run; no pool left; out of memory
INTERRUPTED = STOPS | {0, 2}  # a full disk is the owner's to mend: 2, and the same command goes on


class Killed(BaseException):
    """Nobody catches this: what runs ends where it stands, as by SIGKILL."""


def recipe(chip: str, spare: str = "cpu") -> Any:
    return in_process.recipe(
        chip, spare=spare, sft={"steps": STEPS, "batch_sequences": 4}, train={"snapshot_every_steps": 3}, data={"train_problems": 64},
    )  # fmt: skip


@cache
def undisturbed() -> str:
    with tempfile.TemporaryDirectory() as room:
        code, records = in_process.run(recipe("cpu"), Path(room))
    assert code == 0
    return str(in_process.weights_of(records))


def planted(fault: str | None, onset: int) -> str:
    if fault is None:
        return "cpu"
    window = f"onset_step={onset}" + (f"&until_step={onset}" if fault == "transient" else "")
    return f"sim:{fault}?{window}@cpu"


@contextmanager
def interrupted(what: str, after: int) -> Iterator[None]:
    """The `after`-th record kills the process, before or after it is written; or the disk is full from the `after`-th flush on."""
    count = 0
    write, flush = Ledger.append, os.fsync

    def append(self: Ledger, *records: Any) -> None:
        nonlocal count
        count += 1
        if what == "killed before" and count >= after:
            raise Killed
        write(self, *records)
        if what == "killed after" and count >= after:
            raise Killed

    def fsync(handle: int) -> None:
        nonlocal count
        count += 1
        if what == "disk full" and count >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "snapshots")
        flush(handle)

    with mock.patch.object(Ledger, "append", append), mock.patch.object(os, "fsync", fsync):
        yield


def whatever_happens(
    chip: tuple[str | None, int], spare: tuple[str | None, int], blows: list[tuple[str, int]]
) -> None:
    made = recipe(planted(*chip), planted(*spare))
    with tempfile.TemporaryDirectory() as room:
        for what, after in blows:
            try:
                with interrupted(what, after):
                    code, _ = in_process.run(made, Path(room))
            except Killed:
                continue
            assert code in INTERRUPTED
        code, _ = in_process.run(made, Path(room))
        records: list[AnyRecord] = read_ledger(Path(room) / "ledger.jsonl")
    finished = of_kind(records, RunFinished)
    assert {one.final_weights_sha256 for one in finished} <= {undisturbed()}, "a wrong ok"
    assert (code == 0 and finished) or (code in STOPS and not finished)
    if spare[0] is None:
        assert code == 0, "one sound pool is enough"


chips = st.tuples(st.sampled_from((None, *FAULTS)), st.integers(1, STEPS))
spares = st.tuples(st.sampled_from((None, None, None, *FAULTS)), st.integers(1, STEPS))
blows = st.lists(
    st.tuples(st.sampled_from(("killed before", "killed after", "disk full")), st.integers(1, 60)),
    max_size=3,
)


@example(chip=("zeroed", 5), spare=(None, 1), blows=[("killed before", 30), ("disk full", 4)])
@example(chip=("nan", 2), spare=("device-error", 4), blows=[("killed after", 20)])
@given(chip=chips, spare=spares, blows=blows)
@settings(phases=[Phase.explicit], deadline=None)
def test_a_run_ends_with_the_right_bits_or_says_why_not(
    chip: tuple[str | None, int], spare: tuple[str | None, int], blows: list[tuple[str, int]]
) -> None:
    whatever_happens(chip, spare, blows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(chip=chips, spare=spares, blows=blows)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_runs_end_with_the_right_bits_or_say_why_not(
    chip: tuple[str | None, int], spare: tuple[str | None, int], blows: list[tuple[str, int]]
) -> None:
    whatever_happens(chip, spare, blows)


def test_a_one_off_is_not_met_again_by_the_launch_that_goes_back_for_it(tmp_path: Path) -> None:
    code, records = in_process.run(recipe(planted("transient", 4)), tmp_path)
    assert code == 0 and in_process.weights_of(records) == undisturbed()
    assert [(one.step, one.attribution) for one in of_kind(records, Incident)] == [
        (4, "transient chip fault")
    ]
