"""The packed decoder says what the model says, to the last but one bit."""

from __future__ import annotations

import pytest
import torch

from bascule.config.model import ModelConfig
from bascule.infer import packed
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise

SHAPES = {
    "nano": {"preset": "nano"},
    "tick, groups and two choices": {"preset": "tick"},
    "two shared experts": {"preset": "tick", "n_shared_experts": 2, "routed_scaling_factor": 2.5},
    "dense": {"preset": "nano", "ffn": "swiglu"},
    "untied": {"preset": "nano", "tie_word_embeddings": False},
}


def random_model(**shape: object) -> Transformer:
    model = Transformer(ModelConfig(**{"vocab_size": 64, **shape})).eval()  # type: ignore[arg-type]
    initialise(model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # gains of 1 would hide a forgotten one
            if name.endswith("norm.weight"):
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()))
        for moe in model.moe_layers():
            moe.gate.e_score_correction_bias.copy_(
                torch.linspace(-0.1, 0.1, moe.gate.e_score_correction_bias.numel())
            )
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 5, packed.MOST_ROWS + 1])
@torch.inference_mode()
def test_steps_equal_the_models_own(shape: str, rows: int) -> None:
    model = random_model(**SHAPES[shape])
    fast = packed.pack(model)
    assert fast is not None
    tokens = torch.arange(rows * 9).reshape(rows, 9) * 7 % 64
    mask = torch.arange(9) < torch.arange(rows)[:, None] % 7 + 3
    slow_cache, fast_cache = (model.new_cache(rows, 16) for _ in range(2))
    for cache in (slow_cache, fast_cache):
        model(tokens, mask=mask, cache=cache)
    for step in range(4):
        said = (torch.arange(rows) * 5 + step) % 64
        slow = model(said[:, None], cache=slow_cache).logits_BTV[:, 0]
        quick, _ = fast.step(said, fast_cache)
        assert (quick - slow).abs().max() < 1e-5 * slow.std()
    for a, b in zip(slow_cache.buffers, fast_cache.buffers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_models_of_another_kind_are_left_to_themselves() -> None:
    for shape in (
        {"preset": "tick", "attention": "gqa"},
        {"preset": "tick", "q_lora_rank": 8},
        {"preset": "tick", "n_routed_experts": 32},
    ):
        assert packed.pack(Transformer(ModelConfig(**shape, vocab_size=64))) is None  # type: ignore[arg-type]
    assert (
        packed.pack(Transformer(ModelConfig(preset="tick", vocab_size=64)).to(torch.bfloat16))
        is None
    )
