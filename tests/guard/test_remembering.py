"""An interruption takes nothing from the guard's judgement: a resumed one cries, and blames, as one that never stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bascule.config.trust import GuardConfig
from bascule.guard.hindsight import led_to
from bascule.ledger import of_kind
from bascule.records import StepStats
from bascule.train import checkpoint, loop
from bascule.train.state import TrainState

RARELY = GuardConfig(checksum_every_steps=50, audit_every_steps=50)


def stats(step: int, loss: float = 1.0) -> StepStats:
    return StepStats(
        step=step, phase="sft", loss=loss, grad_norm=1.0, learning_rate=1e-3, tokens=8, seconds=0.1
    )


def _judge_a_bad_batch(rig) -> tuple[bool, list[str], list[str]]:  # type: ignore[no-untyped-def]
    """Step 25 with weights that add up to almost nothing: (committed, sentinels that cried, attributions)."""
    batch = rig.objective.next_batch(25)
    tensors = {name: tensor.clone() for name, tensor in batch.tensors.items()}
    tensors["mask"][0, 1] -= tensors["mask"].sum() - 0.01
    proposal = rig.stepper.propose(dataclasses.replace(batch, tensors=tensors))
    committed = rig.guard.judge(proposal, rig.stepper)
    return (
        committed,
        [alarm.sentinel for alarm in rig.alarms],
        [one.attribution for one in rig.incidents],
    )


def _resumed(guarded: ModuleType, root: Path, *, remember: bool):  # type: ignore[no-untyped-def]
    """A run to its snapshot at step 24, then a new launch that stands there."""
    guarded.rig(root, config=RARELY).run(24, every=12)
    rig = guarded.rig(root, config=RARELY)
    path, _ = checkpoint.newest(rig.folder.snapshots, "saved")
    assert path is not None
    state, _ = loop.resume(rig.stepper, {"sft": rig.objective}, path, TrainState())
    assert state.step == 24
    if remember:
        rig.guard.remember(
            led_to(rig.ledger.read(), 24), [rig.objective.next_batch(step) for step in (23, 24)]
        )
    return rig


def test_a_resumed_guard_refuses_the_batch_that_an_uninterrupted_one_refuses(
    tmp_path: Path, guarded: ModuleType
) -> None:
    whole = guarded.rig(tmp_path / "whole", config=RARELY)
    whole.run(24, every=12)
    expected = _judge_a_bad_batch(whole)
    assert expected[0] is False and expected[2] == ["data"]
    resumed = _resumed(guarded, tmp_path / "resumed", remember=True)
    assert resumed.guard._watch.states[1:4] == whole_states_before(whole)
    assert _judge_a_bad_batch(resumed) == expected
    forgetful = _resumed(guarded, tmp_path / "forgetful", remember=False)
    assert _judge_a_bad_batch(forgetful)[0] is True, "this batch does not need a memory"


def whole_states_before(rig) -> tuple[object, ...]:  # type: ignore[no-untyped-def]
    """The refused step was undone, so the states are still those before it."""
    states: tuple[object, ...] = rig.guard._watch.states[1:4]
    assert len(of_kind(rig.ledger.read(), StepStats)) == 24
    return states


def steps(found: Sequence[StepStats]) -> list[tuple[int, float]]:
    return [(one.step, one.loss) for one in found]


def test_only_the_steps_that_led_to_the_snapshot_are_remembered() -> None:
    # To step 5, back to 2; step 4 is left out the second time, so the first launch's step 4 counts no more.
    ledger = [stats(s) for s in range(1, 6)] + [stats(3, 2.0), stats(5, 2.0), stats(6, 2.0)]
    assert steps(led_to(ledger, 5)) == [(1, 1.0), (2, 1.0), (3, 2.0), (5, 2.0)]
