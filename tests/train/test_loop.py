"""The loop: phases in order, exact resume from any snapshot, and every way it can end early."""

from __future__ import annotations

import math

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.accelerators.registry import open_accelerator
from bascule.errors import GuardStopped, Preempted, SnapshotError
from bascule.train import checkpoint, loop
from bascule.train.loop import Hooks, Plan
from bascule.train.state import TrainState
from bascule.train.step import NoJudge

SFT_STEPS, TOTAL = 3, 7  # of the tiny run


class Refusing(NoJudge):
    """Refuses a step the first `times` times."""

    def __init__(self, step: int, times: int) -> None:
        self.step, self.left = step, times

    def judge(self, proposal, stepper):
        if proposal.step == self.step and self.left:
            self.left -= 1
            return False
        return True


def train(run, folder, judge=None, state=None, **hooks):
    return loop.run(
        run.stepper,
        run.objectives,
        judge or NoJudge(),
        state or TrainState(),
        run.plan(folder),
        Hooks(**hooks),
    )


def test_phases_run_in_order_and_every_step_is_reported_once(tiny, tmp_path):
    steps, saved, phases = [], [], []
    end = train(
        tiny(),
        tmp_path,
        on_step=steps.append,
        on_snapshot=lambda step, path: saved.append(step),
        on_phase=lambda *p: phases.append(p),
    )
    assert end.step == TOTAL and end.phase == "grpo"
    assert [s.step for s in steps] == list(range(1, TOTAL + 1))
    assert [s.phase for s in steps] == ["sft"] * 3 + ["grpo"] * 4
    assert phases == [("sft", 1), ("grpo", 4)]
    assert saved == [0, 2, 3, 4, 6, 7]
    assert [s.reward is not None for s in steps] == [False] * 3 + [True, False, True, False]
    assert steps[3].metrics["kept_group_ratio"] > 0 and all(s.seconds > 0 for s in steps)


def test_resume_from_any_snapshot_ends_with_the_bits_of_the_undisturbed_run(tiny, tmp_path):
    straight = tiny()
    train(straight, tmp_path / "a")
    expected = straight.fingerprint()
    for path in checkpoint.all_snapshots(tmp_path / "a"):
        run = tiny()
        state, warnings = loop.resume(run.stepper, run.objectives, path, TrainState())
        assert warnings == () and state.step == checkpoint.step_of(path)
        train(run, tmp_path / "b", state=state)
        assert run.fingerprint() == expected, path.name


def test_a_run_resumed_twice_is_still_the_same_run(tiny, tmp_path):
    straight = tiny()
    train(straight, tmp_path / "straight")
    run, state = tiny(), TrainState()
    for stop in (2, 5):
        with pytest.raises(Preempted, match=f"after step {stop}"):
            train(
                run,
                tmp_path / "b",
                state=state,
                should_stop=lambda run=run, stop=stop: run.stepper.step == stop,
            )
        path, _ = checkpoint.newest(tmp_path / "b", "saved")
        run = tiny()
        state, _ = loop.resume(run.stepper, run.objectives, path, TrainState())
        assert state.step == stop
    train(run, tmp_path / "b", state=state)
    assert run.fingerprint() == straight.fingerprint()


def test_a_refused_step_is_proposed_again_and_nothing_else_changes(tiny, tmp_path):
    straight, refused = tiny(), tiny()
    train(straight, tmp_path / "a")
    for step in (2, 4, 5):
        refused = tiny()
        train(refused, tmp_path / "b", Refusing(step, 2))
        assert refused.fingerprint() == straight.fingerprint()


def test_a_batch_refused_for_good_is_skipped_and_told(tiny, tmp_path):
    steps, skips = [], []
    end = train(
        tiny(), tmp_path, Refusing(2, 99), on_step=steps.append, on_skip=lambda *s: skips.append(s)
    )
    assert end.step == TOTAL and [s.step for s in steps] == [1, 3, 4, 5, 6, 7]
    assert skips[0][0] == 2 and "3 times" in skips[0][1]


def test_a_loss_that_is_no_number_is_never_committed_even_without_a_guard(tiny, tmp_path):
    run = tiny()
    inner = run.sft.loss
    run.sft.loss = lambda output, tensors: (inner(output, tensors)[0] * math.nan, {})
    before = run.fingerprint()
    with pytest.raises(GuardStopped, match="loss nan"):
        train(run, tmp_path)
    assert run.fingerprint() == before and run.stepper.step == 0


def test_asking_to_stop_after_the_last_step_is_no_preemption(tiny, tmp_path):
    run = tiny()
    assert train(run, tmp_path, should_stop=lambda: run.stepper.step == TOTAL).step == TOTAL


def test_a_snapshot_of_another_recipe_is_refused(tiny, tmp_path):
    run = tiny()
    train(run, tmp_path, state=TrainState(recipe_sha256="a" * 64))
    path, _ = checkpoint.newest(tmp_path, "saved")
    with pytest.raises(SnapshotError, match="aaaaaaaaaaaa"):
        loop.resume(tiny().stepper, run.objectives, path, TrainState(recipe_sha256="b" * 64))


def test_a_snapshot_of_another_model_is_refused(tiny, tmp_path):
    run = tiny()
    run.stepper.begin(run.sft)
    model = {name: t for name, t in run.stepper.model_state().items() if "layers.1" not in name}
    with pytest.raises(SnapshotError, match="another model"):
        run.stepper.load(0, model, run.stepper.optimizer.state_dict(), {}, run.sft)
    model = {**run.stepper.model_state(), "model.norm.weight": torch.ones(3)}
    with pytest.raises(SnapshotError, match=r"model\.norm\.weight"):
        run.stepper.load(0, model, run.stepper.optimizer.state_dict(), {}, run.sft)


def test_a_plan_cut_short_ends_in_the_middle_of_a_phase():
    plan = Plan({"sft": 5, "grpo": 0}, None, 50)
    assert plan.total == 5 and plan.phase_of(5) == "sft" and plan.saves(5) and not plan.saves(4)
    with pytest.raises(ValueError, match="after the last"):
        plan.phase_of(6)


def test_a_run_moved_to_another_chip_ends_with_the_bits_of_the_undisturbed_run(tiny, tmp_path):
    straight, first = tiny(), tiny()
    train(straight, tmp_path / "a")
    with pytest.raises(Preempted):
        train(first, tmp_path / "b", should_stop=lambda: first.stepper.step == 5)
    moved = tiny(open_accelerator("sim:clean@cpu"))
    path, _ = checkpoint.newest(tmp_path / "b", "saved")
    state, warnings = loop.resume(moved.stepper, moved.objectives, path, TrainState())
    assert warnings == () and moved.fingerprint() == first.fingerprint()
    train(moved, tmp_path / "b", state=state)
    assert moved.fingerprint() == straight.fingerprint()


def test_a_corrupting_chip_proposes_other_gradients_than_the_referee_and_discarding_leaves_no_trace(
    tiny,
):
    run = tiny(open_accelerator("sim:ascend-r2?onset_step=1@cpu"))
    run.stepper.begin(run.sft)
    before, differs = run.fingerprint(), False
    for attempt in range(4):
        batch = run.sft.next_batch(1)
        mine, right = (
            run.stepper.propose(batch, attempt=attempt),
            run.stepper.recompute(batch, CpuAccelerator()),
        )
        differs |= any(not torch.equal(g, right.grads[n]) for n, g in mine.grads.items())
        run.stepper.discard(mine)
    assert differs and run.fingerprint() == before and run.stepper.step == 0
