"""The extra loss terms: each is what its formula says, each does what it is for, and a batch without them changes by nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.config.training import SftConfig, TrainConfig
from bascule.model import count, weights
from bascule.model.transformer import Transformer
from bascule.train import extra
from bascule.train.objective import collate
from bascule.train.sft import Sft
from bascule.train.step import Stepper

VOCAB = 30
ROWS = [([1, 5 + n], [(6 + n + i) % 25 + 5 for i in range(9)]) for n in range(12)]


def stepper(mtp: int = 1) -> Stepper:
    model = Transformer(ModelConfig(preset="tick", vocab_size=VOCAB, num_nextn_predict_layers=mtp))
    weights.initialise(model, 0)
    return Stepper(model, CpuAccelerator(), router_bias_speed=0.0)


def objective(steps: int = 12, *, ahead: bool = True, **train: float) -> extra.Extended:
    config = SftConfig(steps=steps, batch_sequences=6, warmup_steps=1)
    inner = Sft(config, ROWS, seed=0, pad_id=0)
    return extra.Extended(inner, TrainConfig.model_validate(train), ahead, True)


def test_the_weight_falls_from_3_to_1_tenth_after_two_thirds() -> None:
    found = [extra.ahead_weight(TrainConfig(), i, 100) for i in range(100)]
    assert found[:67] == [0.3] * 67 and found[67:] == [0.1] * 33


def test_the_ahead_loss_is_the_cross_entropy_of_the_token_after_the_next() -> None:
    model, tensors = stepper().model, collate(ROWS[:3], 0)
    with torch.no_grad():
        output = model(tensors["tokens"], mask=tensors["real"], ahead=True)
        found = extra.ahead_loss(output, tensors)
    full = [prompt + completion for prompt, completion in ROWS[:3]]
    nats = []
    for row, ids in enumerate(full):
        for t in range(len(ids) - 2):
            if t + 2 >= 2:  # the completion begins at 2
                nats.append(F.cross_entropy(output.ahead_BTV[row, t], torch.tensor(ids[t + 2])))
    assert found == pytest.approx(float(torch.stack(nats).mean()), rel=1e-5)


def test_the_prediction_layer_learns_under_training() -> None:
    mine, phase = stepper(), objective(30)
    mine.begin(phase)
    losses = []
    for step in range(1, 31):
        proposal = mine.propose(phase.next_batch(step))
        mine.commit(proposal)
        losses.append(proposal.metrics["ahead_loss"])
    assert losses[-1] < 0.5 * losses[0]
    own, ahead = proposal.metrics["own_loss"], proposal.metrics["ahead_loss"]
    assert proposal.loss == pytest.approx(own + 0.1 * ahead, rel=1e-5)


def test_balanced_experts_cost_one_a_layer_and_a_favourite_costs_more() -> None:
    experts, per_token, real = 4, 1, torch.ones(2, 8, dtype=torch.bool)
    x, even = torch.randn(16, 6), torch.arange(16)[:, None] % experts
    flat = extra.balance_loss([(torch.zeros(experts, 6), x, even)], real)
    assert flat == pytest.approx(1.0)
    weight = torch.zeros(experts, 6)
    weight[0] = 5.0
    favourite = torch.zeros(16, per_token, dtype=torch.int64)
    tilted = extra.balance_loss([(weight, x.abs(), favourite)], real)
    assert tilted > 1.3


def test_padding_does_not_count_in_the_balance() -> None:
    weight, x = torch.randn(4, 6), torch.randn(16, 6)
    chosen = torch.randint(0, 4, (16, 1))
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1, 5:] = False
    before = extra.balance_loss([(weight, x, chosen)], real)
    x[13:], chosen[13:] = 9.0, 0
    assert torch.equal(extra.balance_loss([(weight, x, chosen)], real), before)


def test_the_balance_term_evens_a_tilted_router() -> None:
    def trained(weight: float) -> float:
        mine, phase = stepper(0), objective(25, ahead=False, balance_loss_weight=weight)
        with torch.no_grad():
            for moe in mine.model.moe_layers():
                moe.gate.weight[0] += 0.3
        mine.begin(phase)
        for step in range(1, 26):
            proposal = mine.propose(phase.next_batch(step))
            mine.commit(proposal)
        assert proposal.expert_loads is not None
        return extra.load_metrics(proposal.expert_loads)["expert_max_ratio"]

    assert trained(1.0) < trained(0.0)


def test_a_batch_without_weights_is_the_plain_step_and_no_hook_stays() -> None:
    plain, wrapped = stepper(0), stepper(0)
    off = objective(ahead=False, balance_loss_weight=0.0)
    plain.begin(off.inner)
    wrapped.begin(off)
    one, two = plain.propose(off.inner.next_batch(1)), wrapped.propose(off.next_batch(1))
    assert one.loss == two.loss and one.metrics == two.metrics
    on = objective(ahead=False, balance_loss_weight=1e-4)
    wrapped.begin(on)
    assert "balance_loss" in wrapped.propose(on.next_batch(1)).metrics
    assert not any(moe.gate._forward_hooks for moe in wrapped.model.moe_layers())


def test_load_metrics_by_hand() -> None:
    found = extra.load_metrics(torch.tensor([[4, 4, 4, 4], [8, 8, 0, 0]]))
    assert found == {"expert_max_ratio": 2.0, "experts_idle": 2.0}
    assert extra.load_metrics(None) == {}


def test_the_ahead_loss_is_the_same_without_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    phase = objective()
    kept = stepper()
    kept.begin(phase)
    wanted = kept.propose(phase.next_batch(1))
    monkeypatch.setattr(count, "KEPT_LOGITS_BYTES", 0)
    later = stepper()
    later.begin(phase)
    found = later.propose(phase.next_batch(1))
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert found.metrics["ahead_loss"] == pytest.approx(wanted.metrics["ahead_loss"], rel=1e-5)
