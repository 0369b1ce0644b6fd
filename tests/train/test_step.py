"""A step is a transaction: proposing changes nothing, committing changes exactly what it says, and order does not matter."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bascule.accelerators.base import Work
from bascule.accelerators.cpu import CpuAccelerator
from bascule.model import count
from bascule.train import checkpoint
from bascule.train.objective import Batch
from bascule.train.step import NoJudge


class WitnessedCpu(CpuAccelerator):
    """The CPU, noting which sessions were opened and what happened inside."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[object] = []

    @contextmanager
    def session(self, work: Work):
        self.log.append(work)
        yield
        self.log.append("closed")


class WitnessedJudge(NoJudge):
    def __init__(self, log: list[object]) -> None:
        self.log = log

    @contextmanager
    def watch(self, step, phase, model):
        self.log.append(("watching", step, phase))
        yield
        self.log.append("watched")


def everything(run) -> dict[str, object]:
    stepper = run.stepper
    return {
        **{name: t.detach().clone() for name, t in stepper.model_state().items()},
        **stepper.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "grad": [p.grad for p in stepper.model.parameters()],
        "step": stepper.step,
    }


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, other[k]) if isinstance(a, torch.Tensor) else a == other[k]
        for k, a in one.items()
    )


def test_proposing_twice_gives_equal_bits_and_changes_nothing(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    before = everything(run)
    first, second = (run.stepper.propose(run.sft.next_batch(1)) for _ in range(2))
    assert same(before, everything(run))
    assert first.loss == second.loss and first.grad_norm == second.grad_norm
    assert all(torch.equal(g, second.grads[n]) for n, g in first.grads.items())
    assert torch.equal(first.expert_loads, second.expert_loads)


def test_gradients_cover_every_parameter_once_with_tied_weights_as_one(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    grads = run.stepper.propose(run.sft.next_batch(1)).grads
    assert set(grads) == set(dict(run.stepper.model.named_parameters()))
    assert "lm_head.weight" not in grads


def test_commit_moves_weights_optimizer_router_bias_and_the_count(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    before = everything(run)
    run.stepper.commit(run.stepper.propose(run.sft.next_batch(1)))
    after = everything(run)
    moved = {
        k
        for k in before
        if isinstance(before[k], torch.Tensor) and not torch.equal(before[k], after[k])
    }
    assert run.stepper.step == 1 and after["steps_taken"] == 1
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in moved
    assert set(dict(run.stepper.model.named_parameters())) <= moved


def test_padding_is_not_counted_in_the_expert_loads(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    batch = run.sft.next_batch(1)
    loads = run.stepper.propose(batch).expert_loads
    per_token = run.stepper.model.config.num_experts_per_tok
    worked_out = batch.tensors[
        "places"
    ].numel()  # every real token but the last of each row, which predicts nothing
    assert int(loads.sum()) == per_token * worked_out * len(loads)
    assert worked_out < batch.tensors["real"].numel()


def test_clipping_happens_at_commit_and_leaves_the_proposals_gradients_raw(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    proposal = run.stepper.propose(run.sft.next_batch(1))
    raw = {n: g.clone() for n, g in proposal.grads.items()}
    norm = torch.stack([g.norm() for g in raw.values()]).norm()
    assert (
        proposal.grad_norm == pytest.approx(float(norm), rel=1e-5)
        and proposal.grad_norm > run.sft.clip_grad_norm
    )
    run.stepper.commit(proposal)
    assert all(torch.equal(raw[n], g) for n, g in proposal.grads.items())


def test_a_step_out_of_turn_is_refused(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    proposal = run.stepper.propose(run.sft.next_batch(1))
    run.stepper.commit(proposal)
    with pytest.raises(ValueError, match="only step 2 may follow"):
        run.stepper.commit(proposal)


def test_the_judge_watches_inside_the_chips_session_and_a_replay_carries_its_attempt(tiny):
    chip = WitnessedCpu()
    run = tiny(chip, WitnessedJudge(chip.log))
    run.stepper.begin(run.sft)
    proposal = run.stepper.propose(run.sft.next_batch(1))
    assert chip.log == [Work("train", 1, 0), ("watching", 1, "sft"), "watched", "closed"]
    chip.log.clear()
    run.stepper.recompute(proposal.batch, attempt=2)
    assert chip.log == [Work("train", 1, 2), "closed"]
    chip.log.clear()
    run.stepper.commit(proposal)
    assert chip.log == [Work("train", 1, 0), ("watching", 1, "commit"), "watched", "closed"]


def test_a_referee_recomputes_the_step_from_a_copy_of_the_present_weights(tiny):
    run = tiny(WitnessedCpu())
    run.stepper.begin(run.sft)
    referee = CpuAccelerator("referee")
    for step in (1, 2):
        batch = run.sft.next_batch(step)
        mine = run.stepper.propose(batch)
        before = everything(run)
        theirs = run.stepper.recompute(batch, referee)
        assert same(before, everything(run))
        assert theirs.loss == mine.loss and all(
            torch.equal(g, theirs.grads[n]) for n, g in mine.grads.items()
        )
        run.stepper.commit(mine)


def test_an_empty_batch_is_a_step_that_changes_nothing_but_the_count(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    before = everything(run)
    proposal = run.stepper.propose(Batch("sft", 1, {}, {"reward": 0.0}))
    assert proposal.tokens == 0 and proposal.grads == {} and proposal.metrics == {"reward": 0.0}
    run.stepper.commit(proposal)
    assert same({**before, "step": 1}, everything(run))


def test_any_interleaving_ends_with_the_weights_of_the_straight_run(tiny):
    """Propose, discard, commit, save, go back, in any order: after step n the weights are those of the straight run."""
    straight = tiny()
    straight.stepper.begin(straight.sft)
    expected = [straight.fingerprint()]
    for step in range(1, 5):
        straight.stepper.commit(straight.stepper.propose(straight.sft.next_batch(step)))
        expected.append(straight.fingerprint())

    class Interleaving(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.run = tiny()
            self.run.stepper.begin(self.run.sft)
            self.proposal = None
            self.folder = TemporaryDirectory()
            self.saved: list[Path] = []

        @precondition(lambda self: self.run.stepper.step < 4)
        @rule()
        def propose(self):
            step = self.run.stepper.step + 1
            self.proposal = self.run.stepper.propose(self.run.sft.next_batch(step))

        @precondition(lambda self: self.proposal is not None)
        @rule()
        def discard(self):
            self.run.stepper.discard(self.proposal)
            self.proposal = None

        @precondition(lambda self: self.proposal is not None)
        @rule()
        def commit(self):
            self.run.stepper.commit(self.proposal)
            self.proposal = None

        @rule()
        def save(self):
            stepper = self.run.stepper
            parts = stepper.model_state(), stepper.optimizer.state_dict(), self.run.sft.state_dict()
            self.saved.append(
                checkpoint.save_snapshot(
                    Path(self.folder.name), stepper.step, *parts, {}, phase="sft"
                )
            )

        @precondition(lambda self: self.saved)
        @rule(oldest=st.booleans())
        def go_back(self, oldest: bool):
            found = checkpoint.load(self.saved[0 if oldest else -1])
            self.run.stepper.load(
                found.step, found.model, found.optimizer, found.objective, self.run.sft
            )
            self.proposal = None

        @invariant()
        def weights_are_those_of_the_straight_run(self):
            assert self.run.fingerprint() == expected[self.run.stepper.step]

        def teardown(self):
            self.folder.cleanup()

    run_state_machine_as_test(
        Interleaving,
        settings=settings(
            max_examples=8,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )


def test_a_rehearsed_update_is_the_one_that_commit_makes_and_leaves_no_trace(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    for step in (1, 2):
        proposal = run.stepper.propose(run.sft.next_batch(step))
        before = everything(run)
        expected = run.stepper.rehearse(proposal, CpuAccelerator("referee"))
        assert same(before, everything(run))
        run.stepper.commit(proposal)
        assert all(torch.equal(t, expected[name]) for name, t in run.stepper.model_state().items())


@pytest.mark.parametrize("phase", ["sft", "grpo"])
def test_logits_too_large_to_keep_change_a_step_by_rounding_only(tiny, monkeypatch, phase):
    steps = []
    for limit in (None, 0):
        if limit is not None:
            monkeypatch.setattr(count, "KEPT_LOGITS_BYTES", limit)
        run = tiny()
        run.stepper.step = run.objectives[phase].first_step - 1
        run.stepper.begin(run.objectives[phase])
        batch = run.objectives[phase].next_batch(run.stepper.step + 1)
        steps.append(run.stepper.propose(batch))
    kept, later = steps
    assert later.loss == pytest.approx(kept.loss, rel=1e-5)
    assert later.metrics.keys() == kept.metrics.keys()
    if phase == "grpo":
        assert later.metrics["entropy"] == pytest.approx(kept.metrics["entropy"], rel=1e-4)
    for name, grad in kept.grads.items():
        torch.testing.assert_close(later.grads[name], grad, rtol=1e-3, atol=2e-6, msg=name)
