"""What one model chose, another with other routers replays; its own model replays itself bit for bit."""

from __future__ import annotations

import pytest
import torch

from bascule.config.model import ModelConfig
from bascule.model import weights
from bascule.model.routing import pack, replaying, routes_of, unpack
from bascule.model.transformer import Transformer


@pytest.fixture
def model() -> Transformer:
    made = Transformer(ModelConfig(preset="tick", vocab_size=64, num_nextn_predict_layers=1))
    weights.initialise(made, 0)
    return made


TOKENS = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
REAL = torch.ones(3, 9, dtype=torch.bool)


def test_a_model_that_replays_its_own_routes_computes_the_same_bits_and_agrees_with_itself(
    model,
) -> None:
    plain = model(TOKENS, mask=REAL, ahead=True)
    routes = routes_of(model, TOKENS, REAL)
    with replaying(model, routes.flatten(2)) as agreed:
        again = model(TOKENS, mask=REAL, ahead=True)
    assert torch.equal(again.logits_BTV, plain.logits_BTV)
    assert torch.equal(again.expert_loads, plain.expert_loads)
    assert all(bool(one.all()) for one in agreed) and len(agreed) == routes.shape[2]
    assert torch.equal(
        model(TOKENS, mask=REAL).logits_BTV, plain.logits_BTV
    )  # nothing is left behind


def test_other_routes_change_loads_and_logits_and_gradients_still_reach_the_router(model) -> None:
    routes = routes_of(model, TOKENS, REAL)
    other = (routes + 1) % 8
    with replaying(model, other.flatten(2)) as agreed:
        moved = model(TOKENS, mask=REAL)
    assert not torch.equal(moved.logits_BTV, model(TOKENS, mask=REAL).logits_BTV)
    counts = torch.bincount(other[:, :, 0].flatten(), minlength=8)
    assert torch.equal(moved.expert_loads[0], counts)
    assert not bool(agreed[0].all())
    gate = model.moe_layers()[0].gate.weight
    (grad,) = torch.autograd.grad(moved.logits_BTV.square().sum(), gate)
    assert float(grad.abs().sum()) > 0


def test_routes_travel_as_text() -> None:
    chosen = torch.tensor([[[3, 250], [0, 1]], [[7, 300], [2, 5]]])
    assert unpack(pack(chosen), 2).tolist() == [[3, 250, 0, 1], [7, 300, 2, 5]]
