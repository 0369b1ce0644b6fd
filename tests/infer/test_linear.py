"""Matrices laid out for the CPU give the model's numbers, and the model itself stays as it is."""

from __future__ import annotations

import pytest
import torch

from bascule.config.model import ModelConfig
from bascule.errors import UsageError
from bascule.infer import linear
from bascule.model.transformer import Transformer
from bascule.model.weights import fingerprint, initialise

TOKENS = torch.arange(36).reshape(4, 9) % 64


def model_of(**shape: object) -> Transformer:
    model = Transformer(ModelConfig(preset="tick", vocab_size=64, **shape)).eval()  # type: ignore[arg-type]
    initialise(model, seed=1)
    return model


@pytest.mark.parametrize(
    "shape", [{"attention": "gqa", "attention_bias": True}, {"q_lora_rank": 16}, {"ffn": "swiglu"}]
)
@pytest.mark.parametrize("rows", [1, 4])
@torch.inference_mode()
def test_laid_out_matrices_give_the_same_numbers(
    shape: dict[str, object], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 0)
    model = model_of(**shape)
    before = fingerprint(model)
    laid = linear.lay_out(model, "fp32")
    assert sum(isinstance(part, linear.BlockedLinear) for part in laid.modules()) > 5
    expected = model(TOKENS[:rows]).logits_BTV
    assert (laid(TOKENS[:rows]).logits_BTV - expected).abs().max() < 1e-5 * expected.std()
    caches = [model.new_cache(rows, 12) for _ in range(2)]
    for one, cache in zip((model, laid), caches, strict=True):
        one(TOKENS[:rows], cache=cache)
    steps = [one(TOKENS[:rows, :1], cache=cache).logits_BTV for one, cache in zip((model, laid), caches, strict=True)]  # fmt: skip
    assert (steps[0] - steps[1]).abs().max() < 1e-5 * expected.std()
    assert fingerprint(model) == before
    assert not any(isinstance(part, linear.BlockedLinear) for part in model.modules())


@torch.inference_mode()
def test_bf16_is_near_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 0)
    model = model_of(attention="gqa", ffn="swiglu")
    if not torch.cpu._is_avx512_bf16_supported():
        with pytest.raises(UsageError, match="AVX512-BF16"):
            linear.lay_out(model, "bf16")
        return
    expected = model(TOKENS).logits_BTV
    found = linear.lay_out(model, "bf16")(TOKENS).logits_BTV
    assert 0 < (found - expected).abs().max() < 0.1 * expected.std()
