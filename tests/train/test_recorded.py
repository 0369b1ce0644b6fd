"""Recorded steps: the operators' bits or none, and never where somebody looks at the operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bascule.accelerators.base import MemoryUse
from bascule.accelerators.cpu import CpuAccelerator
from bascule.accelerators.registry import open_accelerator
from bascule.model.experts import Experts
from bascule.train.recorded import MOST_COUNTED, RECORD_AFTER, TRIALS, RecordedSteps
from bascule.train.step import NoJudge, Proposal, Stepper
from tests.recordings import Recordings
from tests.train import steps

FIRST = RECORD_AFTER + TRIALS + 1
"""The first step that is played back."""


@pytest.fixture(autouse=True)
def _experts_as_on_a_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU reads on the host how many rows each expert has."""
    monkeypatch.setattr(Experts, "forward", Experts.padded)


class Glancing(NoJudge):
    """Looks at every third step."""

    def looks(self, step: int) -> bool:
        return step % 3 == 0


class Chip(CpuAccelerator):
    """A CPU that can say how much of its memory is free."""

    free: int | None = None

    def free_bytes(self) -> int | None:
        return self.free

    def memory(self) -> MemoryUse:
        return MemoryUse(100 << 20, 300 << 20, None)


class Told:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []


def stepper(record: Callable[[Callable[[], None]], Callable[[], None]], told: Told, chip: Chip | None = None) -> Stepper:  # fmt: skip
    chip = chip or Chip()
    made = steps.stepper(chip)
    recorded = RecordedSteps(chip, record, tell=told.said.append, warn=told.warned.append)
    return Stepper(made.model, chip, router_bias_speed=1e-3, recorded=recorded)


def trained(taking: Stepper, phase: str, count: int) -> list[Proposal]:
    objective = steps.objectives(taking)[phase]
    taking.begin(objective)
    batch = objective.next_batch(1)
    done = []
    for step in range(1, count + 1):
        proposal = taking.propose(replace(batch, step=step))
        done.append(proposal)
        taking.commit(proposal)
    return done


def bits(taking: Stepper) -> list[torch.Tensor]:
    return [one.detach().clone() for one in taking.model_state().values()]


@pytest.mark.parametrize("phase", ["sft", "pretrain", "grpo"])
def test_steps_that_are_played_back_are_the_same_run_bit_for_bit(phase: str) -> None:
    told, count = Told(), FIRST + 4
    playing, plain = stepper(Recordings("cpu"), told), steps.stepper(CpuAccelerator())
    with_it, without = trained(playing, phase, count), trained(plain, phase, count)
    assert [one.played for one in with_it] == [False] * (FIRST - 1) + [True] * 5
    assert (len(told.said), told.warned) == (1, [])
    assert "gave the operators' bits 3 times" in told.said[0]
    assert [(a.loss, a.grad_norm, a.metrics) for a in with_it] == [(b.loss, b.grad_norm, b.metrics) for b in without]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(bits(playing), bits(plain), strict=True))


def test_a_played_step_keeps_what_it_found_and_equals_what_is_computed_again() -> None:
    playing = stepper(Recordings("cpu"), Told())
    last = trained(playing, "sft", FIRST)[-1]
    one = playing.propose(replace(last.batch, step=playing.step + 1))
    kept = {name: grad.clone() for name, grad in one.grads.items()}
    turned = {name: tensor.flip(0) for name, tensor in last.batch.tensors.items() if name in ("tokens", "targets")}  # fmt: skip
    turned["tokens"] = turned["tokens"].clamp(max=9)
    other = playing.propose(replace(one.batch, tensors={**one.batch.tensors, **turned}))
    assert one.played and other.played and other.loss != one.loss
    again = playing.recompute(one.batch)
    assert not again.played and again.loss == one.loss
    for name, grad in kept.items():
        assert torch.equal(one.grads[name], grad) and torch.equal(again.grads[name], grad)


def test_a_step_that_the_judge_looks_into_goes_operator_by_operator() -> None:
    playing = stepper(Recordings("cpu"), Told())
    playing.judge = Glancing()
    done = trained(playing, "sft", 24)
    assert not any(one.played for one in done if one.step % 3 == 0)
    assert any(one.played for one in done)


def test_a_recording_with_other_bits_is_not_used_and_it_is_said() -> None:
    told = Told()

    def wrong(run: Callable[[], None]) -> Callable[[], None]:
        play = Recordings("cpu")(run)
        taking = playing.model.lm_head.weight

        def replay() -> None:
            with torch.no_grad():
                taking.mul_(1.001)
                play()
                taking.div_(1.001)

        return replay

    playing = stepper(wrong, told)
    done = trained(playing, "sft", FIRST + 2)
    assert not any(one.played for one in done) and told.said == []
    assert len(told.warned) == 1 and "other bits than its operators" in told.warned[0]


def test_a_chip_that_refuses_to_record_trains_on() -> None:
    told = Told()

    def refuses(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    done = trained(stepper(refuses, told), "sft", FIRST + 2)
    assert not any(one.played for one in done)
    assert len(told.warned) == 1 and "not permitted" in told.warned[0]


def test_a_value_that_the_host_knew_while_recording_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(Experts, "forward", Experts.sliced)
    told = Told()
    done = trained(stepper(Recordings("cpu"), told), "sft", FIRST + 20)
    assert not any(one.played for one in done)
    assert len(told.warned) == 1 and "other bits than its operators" in told.warned[0]


@pytest.mark.parametrize(("free", "played"), [(199 << 20, False), (200 << 20, True), (None, True)])
def test_a_recording_leaves_room_for_the_steps_that_are_looked_into(free: int | None, played: bool) -> None:  # fmt: skip
    told, chip = Told(), Chip()
    chip.free = free
    done = trained(stepper(Recordings("cpu"), told, chip), "sft", FIRST + 1)
    assert done[-1].played is played
    assert ("199 MiB free" in "".join(told.warned)) is not played


def test_shapes_that_never_come_again_are_forgotten_and_recordings_kept() -> None:
    playing = stepper(Recordings("cpu"), Told())
    last = trained(playing, "pretrain", FIRST)[-1]
    recorded = playing._recorded
    assert recorded is not None
    for length in range(2 * MOST_COUNTED):
        recorded.met({"tokens": torch.zeros(1, length)}, None, None)  # type: ignore[arg-type]
    assert len(recorded._shapes) <= MOST_COUNTED + 1
    assert playing.propose(replace(last.batch, step=playing.step + 1)).played


def test_another_phase_has_recordings_of_its_own() -> None:
    told = Told()
    playing = stepper(Recordings("cpu"), told)
    assert trained(playing, "sft", FIRST)[-1].played
    playing.step = 0
    assert not trained(playing, "pretrain", 2)[-1].played


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["sft", "pretrain", "grpo"])
def test_on_a_gpu_a_step_is_recorded_and_keeps_its_bits(phase: str) -> None:
    chip = open_accelerator("cuda")
    chip.prepare(1)
    record, told = chip.recorder("train"), Told()
    assert record is not None
    recorded = RecordedSteps(chip, record, tell=told.said.append, warn=told.warned.append)
    playing = Stepper(steps.stepper(chip).model, chip, router_bias_speed=1e-3, recorded=recorded)
    plain = steps.stepper(chip)
    with_it, without = trained(playing, phase, FIRST + 4), trained(plain, phase, FIRST + 4)
    assert (with_it[-1].played, told.warned) == (True, [])
    assert [(a.loss, a.grad_norm) for a in with_it] == [(b.loss, b.grad_norm) for b in without]
    assert all(torch.equal(a, b) for a, b in zip(bits(playing), bits(plain), strict=True))
