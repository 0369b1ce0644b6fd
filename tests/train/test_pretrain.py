"""Pretraining: documents do not see each other, what cannot be foreseen does not count, resume is exact, and it learns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.config.training import PretrainConfig
from bascule.data.shards import Text
from bascule.model import weights
from bascule.model.transformer import Transformer
from bascule.train import checkpoint, loop
from bascule.train.pretrain import Pretrain, Reading, measure
from bascule.train.state import TrainState
from bascule.train.step import NoJudge, Stepper

VOCAB, BOS, EOS = 40, 1, 2


def reading(length: int = 16, *, document_mask: bool = True) -> Reading:
    """Documents that count upwards from a random number: learnable, and foreseeable from within the document only."""
    rng = np.random.default_rng(0)
    rows = [
        [BOS, *((start + np.arange(size)) % 30 + 5).tolist(), EOS]
        for start, size in zip(rng.integers(0, 30, 60), rng.integers(5, 25, 60), strict=True)
    ]
    ends = np.cumsum([len(row) for row in rows]).astype(np.uint64)
    text = Text([np.concatenate(rows).astype(np.uint16)], [ends])
    token_bytes = np.array([0 if i in (0, BOS, EOS) else 2 for i in range(VOCAB)])
    return Reading(text, length, token_bytes, document_mask)


def stepper() -> Stepper:
    model = Transformer(ModelConfig(preset="tick", vocab_size=VOCAB))
    weights.initialise(model, 0)
    return Stepper(model, CpuAccelerator(), router_bias_speed=1e-3)


def objective(**changes: object) -> Pretrain:
    config = PretrainConfig.model_validate(
        {
            "data": "x",
            "steps": 6,
            "batch_sequences": 4,
            "sequence_length": 16,
            "warmup_steps": 1,
            **changes,
        }
    )
    return Pretrain(config, reading(), seed=0)


def test_no_token_sees_another_document() -> None:
    model = stepper().model
    tokens = torch.randint(5, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        one = model(tokens, mask=mask, documents=documents).logits_BTV
        changed = tokens.clone()
        changed[0, :5] = 7
        other = model(changed, mask=mask, documents=documents).logits_BTV
        open_ = model(changed, mask=mask).logits_BTV
    torch.testing.assert_close(
        one[:, 5:], other[:, 5:]
    )  # experts see other slices, hence not bit-equal
    assert not torch.allclose(one[:, 5:], open_[:, 5:])


def test_the_first_token_of_a_document_does_not_count() -> None:
    tensors = reading().rows([0, 16, 32])
    counted = tensors["targets"][tensors["mask"].bool()]
    assert BOS not in counted and EOS in counted
    assert (tensors["target_bytes"][tensors["targets"] == EOS] == 0).all()


def test_the_windows_of_a_text_count_every_target_once() -> None:
    text = reading()
    tensors = text.rows(list(range(0, len(text.text) - 1, 16)))
    assert int(tensors["mask"].sum()) == len(text.text) - len(text.text.document_ends)


def test_an_untrained_uniform_model_has_the_bits_per_byte_of_its_vocabulary() -> None:
    found = measure(
        lambda t: torch.full(t["targets"].shape, -math.log(VOCAB)),
        reading(),
        rows=4,
        windows=10_000,
    )
    assert found["bits_per_byte"] == pytest.approx(math.log2(VOCAB) / 2)
    assert found["nats_per_token"] == pytest.approx(math.log(VOCAB))


def test_it_learns_and_the_mask_is_worth_something_to_read() -> None:
    mine, phase = stepper(), objective(steps=40, batch_sequences=8)
    start = measure(lambda t: mine.score(t, 1), reading(), rows=8, windows=20)["bits_per_byte"]
    mine.begin(phase)
    for step in range(1, 41):
        proposal = mine.propose(phase.next_batch(step))
        mine.commit(proposal)
    assert "bits_per_byte" in proposal.metrics
    end = measure(lambda t: mine.score(t, 40), reading(), rows=8, windows=20)["bits_per_byte"]
    assert end < 0.5 * start


def test_a_run_cut_twice_ends_with_the_same_bits(tmp_path: Path) -> None:
    def go(folder: Path, *stops: int) -> str:
        mine, state = stepper(), TrainState()
        objectives = {"pretrain": objective()}
        for stop in (*stops, 6):
            plan = loop.Plan({"pretrain": stop}, folder, 2)
            state = loop.run(mine, objectives, NoJudge(), state, plan)
            mine, objectives = stepper(), {"pretrain": objective()}
            path, _ = checkpoint.newest(folder, at_least="saved")
            assert path
            state, _ = loop.resume(mine, objectives, path, TrainState())
        return weights.fingerprint(mine.model)

    assert go(tmp_path / "cut", 2, 4) == go(tmp_path / "whole")


def test_wsd_stays_at_the_top_and_ends_low() -> None:
    phase = objective(steps=100, warmup_steps=10, decay_ratio=0.2)
    factors = [phase.learning_rate(step)[0] for step in range(1, 101)]
    assert factors[0] == 0.1 and factors[9:80] == [1.0] * 71
    assert factors[80] == 1.0 and 0 < factors[99] < 0.06
    assert all(a >= b for a, b in zip(factors[80:], factors[81:], strict=False))


def test_a_recorded_batch_gives_its_loss_again_without_the_text() -> None:
    """What `bascule replay` does: the incident brings the batch, the shards may be gone."""
    from bascule.config.load import recipe_from
    from bascule.stages.replay import _objective

    mine, phase = stepper(), objective()
    mine.begin(phase)
    batch = phase.next_batch(3)
    first = mine.propose(batch)
    raw = {"name": "x", "pools": {"a": {"accelerator": "cpu"}}, "pretrain": {"data": "gone"}}
    mine.begin(_objective(recipe_from(raw, source="test"), "pretrain"))
    assert mine.recompute(batch).loss == first.loss
