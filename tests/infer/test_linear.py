"""Matrices laid out for the CPU give the model's numbers, and the model itself stays as it is."""

from __future__ import annotations

import pytest
import torch

from bascule.config.model import ModelConfig
from bascule.errors import UsageError
from bascule.infer import linear
from bascule.infer.compiled import Panels, compiled
from bascule.infer.score import divergence
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
@pytest.mark.parametrize("native", [False, True])
@torch.inference_mode()
def test_laid_out_matrices_give_the_same_numbers(
    shape: dict[str, object], rows: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 0)
    model = model_of(**shape)
    before = fingerprint(model)
    laid = linear.lay_out(model, "fp32", native=native)
    kind = linear.PanelLinear if native and compiled() is not None else linear.BlockedLinear
    assert sum(isinstance(part, kind) for part in laid.modules()) > 5
    expected = model(TOKENS[:rows]).logits_BTV
    assert (laid(TOKENS[:rows]).logits_BTV - expected).abs().max() < 1e-5 * expected.std()
    caches = [model.new_cache(rows, 12) for _ in range(2)]
    for one, cache in zip((model, laid), caches, strict=True):
        one(TOKENS[:rows], cache=cache)
    steps = [one(TOKENS[:rows, :1], cache=cache).logits_BTV for one, cache in zip((model, laid), caches, strict=True)]  # fmt: skip
    assert (steps[0] - steps[1]).abs().max() < 1e-5 * expected.std()
    assert fingerprint(model) == before
    assert not any(isinstance(part, kind) for part in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 22, 300])
@pytest.mark.parametrize("shape", [(37, 48), (200, 33), (1030, 70)])
def test_the_compiled_product_is_the_plain_one(
    dtype: torch.dtype, rows: int, shape: tuple[int, int]
) -> None:
    if compiled() is None:
        pytest.skip("no C++ compiler here")
    weight, x, bias = torch.randn(shape), torch.randn(rows, 1, shape[1]), torch.randn(shape[0])
    codes, scale = (weight, None) if dtype == torch.float32 else linear.quantised(weight)
    plain = codes.float() * (1.0 if scale is None else scale)
    expected = torch.nn.functional.linear(x, plain, bias)
    found = Panels.of(codes, scale, bias).product(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for row in range(rows):  # to the bit, whatever shares the call
        assert torch.equal(Panels.of(codes, scale, bias).product(x[row]), found[row])


@torch.inference_mode()
def test_int8_is_near_and_says_how_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 0)
    model = model_of(attention="gqa", ffn="swiglu")
    if compiled() is None:
        with pytest.raises(UsageError, match="compiler"):
            linear.lay_out(model, "int8")
        return
    laid = linear.lay_out(model, "int8")
    assert sum(isinstance(part, linear.PanelLinear) for part in laid.modules()) > 5
    kl = divergence(model, laid, TOKENS.flatten().tolist())
    assert 0 < kl < 1e-3


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


@torch.inference_mode()
def test_what_other_chips_compute_in_bf16_is_what_a_judge_on_the_cpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """On a CPU here; on a foreign device: tests/standin/on_npu.py."""
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 0)
    model = model_of(attention="mla", ffn="moe")
    there = linear._with(model, linear.HalfLinear, linear.HalfExperts)
    assert sum(isinstance(part, linear.HalfExperts) for part in there.modules()) == len(model.moe_layers()) > 0  # fmt: skip
    exact, found = model(TOKENS).logits_BTV, there(TOKENS).logits_BTV
    judge = linear.as_laid_out(model, torch.bfloat16, experts=True)(TOKENS).logits_BTV
    without = linear.as_laid_out(model, torch.bfloat16)(TOKENS).logits_BTV
    off = (found - exact).square().mean().sqrt()
    assert 0 < off < 0.03 * exact.std()
    assert (found - judge).square().mean().sqrt() < 0.7 * off
    assert not torch.equal(judge, without)
    assert linear.lay_out(model.to("meta"), "bf16").lm_head.weight.is_meta


def test_a_small_model_on_another_chip_has_no_second_precision() -> None:
    model = model_of(attention="gqa", ffn="swiglu").to("meta")
    assert linear.lay_out(model, "bf16") is model is linear.lay_out(model, "int8")
