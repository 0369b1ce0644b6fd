"""A step asks its chip for values once, when it is done: no operator inside makes the host wait. On a foreign device: tests/standin/on_npu.py."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.model import kernels
from bascule.train.gradients import fetched
from tests.train import steps
from tests.waits import Waits


@pytest.mark.parametrize("phase", ["sft", "pretrain", "grpo"])
@pytest.mark.parametrize("plain", [True, False])
def test_no_operator_of_a_step_asks_for_a_value_before_it_is_done(phase: str, plain: bool) -> None:
    stepper = steps.stepper(CpuAccelerator())
    objective = steps.objectives(stepper)[phase]
    stepper.begin(objective)
    for step in (1, 2):
        batch = objective.next_batch(step)
        with kernels.plain() if plain else nullcontext(), Waits() as waits:
            stepper.commit(stepper.propose(batch))
        assert waits.seen == {
            "_local_scalar_dense": 1
        }  # of the batch's own mask, which lies on the host


def test_what_makes_a_host_wait_is_seen() -> None:
    x = torch.arange(4.0)
    with Waits() as waits:
        float(x[1]), x[x > 1], x.nonzero(), x.masked_select(x > 2), x[torch.tensor([1, 2])]
    assert waits.seen == {"_local_scalar_dense": 1, "index by a mask": 1, "nonzero": 1, "masked_select": 1}  # fmt: skip


def test_values_that_are_fetched_together_are_those_that_were_there() -> None:
    scalars = [torch.tensor(0.1), torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(7)]
    assert fetched(scalars) == [float(one) for one in scalars]
