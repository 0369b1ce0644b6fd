"""Tokens worked out once each give the loss, the gradients and the expert loads of the padded batch, whoever computes it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.model import kernels, seats
from bascule.model.seats import Seats
from bascule.train.gradients import forward
from bascule.train.objective import Batch, collate, counted_logprobs, seated
from bascule.train.step import Stepper
from tests.infer.test_packed import random_model

GROUPS = [([5, 6, 7, 8], [[9, 10, 2], [11, 2], [12, 13, 14, 15, 2]]), ([3, 4], [[2], [20, 21, 2]])]
ROWS = [(prompt, said) for prompt, all_said in GROUPS for said in all_said]


def batch() -> dict[str, torch.Tensor]:
    tensors = collate(ROWS, 0)
    return tensors | seated(GROUPS, tensors["tokens"].shape[1])


def test_every_token_is_worked_out_once_and_sits_where_it_sat() -> None:
    tensors = batch()
    where = Seats(tensors["seats"], tensors["places"])
    assert len(where.place_N) == 4 + 2 + 1 + 4 + 2 + 0 + 2
    flat = tensors["tokens"].flatten()[where.place_N]
    predicting = torch.zeros_like(tensors["real"])
    for row, (prompt, said) in enumerate(ROWS):
        predicting[row, : len(prompt) + len(said) - 1] = True
    assert torch.equal(flat[where.token_ST][predicting], tensors["tokens"][predicting])
    assert int(tensors["copies"].sum()) == int(predicting.sum())
    assert torch.equal(tensors["picks"], where.token_ST[tensors["mask"].bool()])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "shape",
    [{"preset": "nano"}, {"preset": "tick", "attention": "gqa", "qk_norm": True}, {"preset": "tick", "q_lora_rank": 8}],
)  # fmt: skip
def test_it_is_the_padded_batch(shape: dict[str, object], plain: bool) -> None:
    model, tensors = random_model(**shape), batch()
    padded = {name: one for name, one in tensors.items() if name not in seats.NAMES}
    weight = torch.randn(tensors["mask"].shape, generator=torch.Generator().manual_seed(0))
    found = []
    with kernels.plain() if plain else nullcontext():
        for one in (tensors, padded):
            output = forward(model, one)
            logp = counted_logprobs(output, one) * one["mask"]
            grads = torch.autograd.grad((logp * weight).sum(), list(model.parameters()))
            found.append((logp, output.expert_loads, grads))
    (logp, loads, grads), (logp_padded, loads_padded, grads_padded) = found
    torch.testing.assert_close(logp, logp_padded, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(grads, grads_padded, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max() + 1), rtol=1e-4)  # fmt: skip
    ends = sum(len(p) + len(c) for p, c in ROWS) - int(tensors["copies"].sum())
    if (
        loads is not None
    ):  # the last token of a row predicts nothing: padded, all but the longest row's are worked out
        per_token = model.config.num_experts_per_tok
        assert (loads_padded.sum(1) - loads.sum(1)).tolist() == [(ends - 1) * per_token] * len(
            loads
        )


def test_a_score_is_of_the_targets_that_count() -> None:
    stepper = Stepper(random_model(preset="nano"), CpuAccelerator())
    tensors = batch()
    scored = stepper.score(tensors, 1)
    padded = stepper.score({n: t for n, t in tensors.items() if n not in seats.NAMES}, 1)
    torch.testing.assert_close(scored, padded * tensors["mask"], atol=1e-5, rtol=1e-5)
    assert bool((scored[tensors["mask"] == 0] == 0).all())


def test_a_part_of_a_batch_is_worked_out_padded() -> None:
    from bascule.guard.replay import some_sequences

    cut = some_sequences(Batch("grpo", 1, batch()), 2, key=3)
    assert len(cut.tensors["tokens"]) == 2 and not set(seats.NAMES) & set(cut.tensors)
