"""A guard over steps that are played back: no cry where they are sound, and a recording that goes wrong is not certified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from bascule import errors
from bascule.train.recorded import RecordedSteps
from tests.recordings import Recordings


def playing(guarded: ModuleType, root: Path, record: Callable[[Callable[[], None]], Callable[[], None]]):  # type: ignore[no-untyped-def]  # fmt: skip
    """A guarded run of packed windows, which come in one shape; dense: a CPU reads the sizes of experts on the host."""
    rig = guarded.rig(root, ffn="swiglu")
    rig.objective.config = rig.objective.config.model_copy(update={"pack_tokens": 128})
    rig.warned = []
    chip = rig.stepper.accelerator
    rig.stepper._recorded = RecordedSteps(chip, record, tell=str, warn=rig.warned.append)
    rig.seen = []
    judge = rig.guard.judge

    def judged(proposal, stepper):  # type: ignore[no-untyped-def]
        rig.seen.append((proposal.step, proposal.played))
        return judge(proposal, stepper)

    rig.guard.judge = judged
    return rig


def test_played_steps_raise_no_alarm_and_are_certified_by_steps_computed_again(
    tmp_path: Path, guarded: ModuleType
) -> None:
    rig = playing(guarded, tmp_path / "a", Recordings("cpu"))
    rig.run(60, every=10)
    assert (rig.alarms, rig.incidents, rig.warned) == ([], [], [])
    assert sum(played for _, played in rig.seen) > 8
    assert not any(played for step, played in rig.seen if rig.guard.looks(step))
    assert rig.certified == [0, 10, 20, 30, 40, 50]


def test_a_recording_that_goes_wrong_ends_as_the_chips_fault_before_it_is_certified(
    tmp_path: Path, guarded: ModuleType
) -> None:
    count, rotten = 0, []

    def rots(run: Callable[[], None]) -> Callable[[], None]:
        """From the tenth replay on two tokens of every batch are lost."""
        play = Recordings("cpu")(run)

        def replay() -> None:
            nonlocal count
            count += 1
            if count > 10:
                rotten.append(rig.stepper.step + 1)
                shapes = rig.stepper._recorded._shapes.values()
                shape = next(one for one in shapes if one.replay)
                shape.given["mask"][0, 1:3] = 0.0
            play()

        return replay

    rig = playing(guarded, tmp_path, rots)
    with pytest.raises(errors.RollbackNeeded):
        rig.run(200, every=5)
    assert rig.alarms[-1].sentinel == "recording"
    assert rig.incidents[-1].attribution == "transient chip fault"
    assert rig.certified[-1] < rotten[0] <= rig.seen[-1][0] <= rotten[0] + 4
