from __future__ import annotations

import pytest
import torch

from bascule.config.training import SftConfig
from bascule.errors import UsageError
from bascule.model import seats
from bascule.train.objective import Batch, choose, collate, packed, token_logprobs
from bascule.train.sft import Sft


def padded(batch: Batch) -> Batch:
    """The same batch without its seats."""
    plain = {name: one for name, one in batch.tensors.items() if name not in seats.NAMES}
    return Batch(batch.phase, batch.step, plain)


def test_padding_is_not_worked_out_and_nothing_else_changes(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    batch = run.sft.next_batch(1)
    assert batch.tensors["places"].numel() < batch.tensors["tokens"].numel()
    one, two = run.stepper.propose(batch), run.stepper.propose(padded(batch))
    assert two.loss == pytest.approx(one.loss, rel=1e-6) and one.tokens == two.tokens
    for name, grad in one.grads.items():
        torch.testing.assert_close(two.grads[name], grad, rtol=1e-4, atol=1e-6)


def test_a_batch_depends_on_seed_and_step_alone(material):
    _, _, examples, _ = material
    one, two = (Sft(SftConfig(batch_sequences=8), examples, seed=0, pad_id=0) for _ in range(2))
    for step in (1, 5, 40):
        one.next_batch(step)
    assert torch.equal(one.next_batch(3).tensors["tokens"], two.next_batch(3).tensors["tokens"])
    other = Sft(SftConfig(batch_sequences=8), examples, seed=1, pad_id=0)
    assert (
        one.next_batch(3).tensors["tokens"].tolist()
        != other.next_batch(3).tensors["tokens"].tolist()
    )


def test_every_epoch_takes_every_example_once_even_when_batches_straddle_epochs():
    drawn = [i for start in range(0, 40, 4) for i in choose(0, "order", start, 4, 10)]
    for epoch in range(4):
        assert sorted(drawn[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]


def test_only_completion_tokens_count_and_targets_are_the_next_tokens():
    got = collate([([5, 6, 7], [8, 9]), ([5], [6])], pad_id=0)
    assert got["tokens"].tolist() == [[5, 6, 7, 8], [5, 6, 0, 0]]
    assert got["targets"].tolist() == [[6, 7, 8, 9], [6, 0, 0, 0]]
    assert got["mask"].tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert got["real"].tolist() == [[True, True, True, True], [True, True, False, False]]


def test_loss_is_nats_per_completion_token_of_the_whole_batch(tiny):
    run = tiny()
    tensors = padded(run.sft.next_batch(1)).tensors
    output = run.stepper.model(tensors["tokens"])
    loss, _ = run.sft.loss(output, tensors)
    nats = -token_logprobs(output.logits_BTV, tensors["targets"])[tensors["mask"].bool()]
    assert float(loss.detach()) == pytest.approx(float(nats.detach().mean()), rel=1e-6)


def test_padding_does_not_change_loss_or_gradients(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    batch = padded(run.sft.next_batch(1))
    wide = {name: torch.nn.functional.pad(t, (0, 5)) for name, t in batch.tensors.items()}
    one, two = run.stepper.propose(batch), run.stepper.propose(type(batch)("sft", 1, wide))
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    for name, grad in one.grads.items():
        torch.testing.assert_close(two.grads[name], grad, rtol=1e-4, atol=1e-6)


def test_a_few_steps_learn(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    losses = []
    for step in range(1, 13):
        proposal = run.stepper.propose(run.sft.next_batch(step))
        run.stepper.commit(proposal)
        losses.append(proposal.loss)
    assert losses[-1] < losses[0] - 0.4


def test_no_examples_is_refused_with_the_way_out():
    with pytest.raises(UsageError, match="solver traces"):
        Sft(SftConfig(), [], seed=0, pad_id=0)


def test_packing_changes_neither_loss_nor_gradients(tiny):
    run = tiny()
    run.stepper.begin(run.sft)
    plain = run.sft.next_batch(1)
    run.sft.config = run.sft.config.model_copy(update={"pack_tokens": 128})
    tight = run.sft.next_batch(1)
    assert len(tight.tensors["tokens"]) < len(plain.tensors["tokens"]) / 2
    assert int(tight.tensors["mask"].sum()) == int(plain.tensors["mask"].sum())
    one, two = run.stepper.propose(plain), run.stepper.propose(tight)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    for name, grad in one.grads.items():
        torch.testing.assert_close(two.grads[name], grad, rtol=1e-3, atol=1e-6)


def test_packed_rows_are_laid_end_to_end_longest_first():
    got = packed([([5], [6]), ([1, 2], [3, 4]), ([7], [8, 9])], 4, pad_id=0)
    assert got["tokens"].tolist() == [[1, 2, 3, 5], [7, 8, 0, 0]]
    assert got["targets"].tolist() == [[2, 3, 4, 6], [8, 9, 0, 0]]
    assert got["mask"].tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
    assert got["documents"].tolist() == [[0, 0, 0, 1], [0, 0, -1, -1]]
