"""What training counts on: no hidden state, bit-equal repeats, ties that hold, fp32 tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bascule.config.model import ModelConfig
from bascule.model import weights
from bascule.model.transformer import Transformer


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _model(**overrides: object) -> Transformer:
    model = Transformer(ModelConfig.model_validate({"preset": "tick", **overrides}))
    weights.initialise(model, seed=0)
    return model


def _tokens(rows: int = 4, length: int = 20) -> Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(4))


def _gradients(model: Transformer) -> dict[str, Tensor]:
    model.zero_grad()
    tokens = _tokens()
    F.cross_entropy(
        model(tokens[:, :-1]).logits_BTV.flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_backward_is_bit_equal_when_repeated_and_reaches_every_parameter(attention: str) -> None:
    model = _model(attention=attention)
    first, second = _gradients(model), _gradients(model)
    assert first.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].abs().max() > 0 for name in first)


def test_forward_changes_no_byte_of_the_model() -> None:
    model = _model()
    before = weights.fingerprint(model)
    model(_tokens())
    model(_tokens(), mask=torch.ones(4, 20, dtype=torch.bool), cache=model.new_cache(4, 30))
    assert weights.fingerprint(model) == before


def test_a_tie_holds_after_moving_and_after_being_cut() -> None:
    model = _model().to(torch.float64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.retie()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_a_tie_survives_a_move_that_makes_new_parameters() -> None:
    """What `.to` does on a private-use device (npu): every parameter is replaced, and a shared one is replaced twice."""
    model = _model()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model = model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float64


def test_an_untied_head_is_its_own_parameter() -> None:
    model = _model(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "lm_head.weight" in dict(model.named_parameters())


def test_rotary_tables_survive_a_cast_to_bf16() -> None:
    model = _model()
    before = model.model.rotary.cos_PR.clone()
    model = model.to(torch.bfloat16)
    assert torch.equal(model.model.rotary.cos_PR, before)
    logits = model(_tokens()).logits_BTV
    assert logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_bf16_stays_near_fp32(attention: str) -> None:
    """Without experts: a routing decision that a rounding turns over is a jump, not an error of this size."""
    model = _model(attention=attention, ffn="swiglu").requires_grad_(False)
    exact = model(_tokens()).logits_BTV
    rough = model.to(torch.bfloat16)(_tokens()).logits_BTV
    assert (rough - exact).pow(2).mean().sqrt() < 0.05 * exact.pow(2).mean().sqrt()


def test_positions_matter_only_by_their_distance() -> None:
    model = _model()
    tokens = _tokens()
    here = model(tokens).logits_BTV
    shifted = model(tokens, positions_BT=(torch.arange(20) + 50).expand(4, -1)).logits_BTV
    stretched = model(tokens, positions_BT=(torch.arange(20) * 3).expand(4, -1)).logits_BTV
    torch.testing.assert_close(shifted, here, rtol=1e-4, atol=1e-5)
    assert (stretched - here).abs().max() > 1e-3


def test_a_tiny_model_learns_a_fixed_batch() -> None:
    model, tokens = _model(), _tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(
            model(tokens[:, :-1]).logits_BTV.flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
