"""Counts against published figures, and against the real module."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bascule.config.model import ModelConfig
from bascule.model import count, kernels
from bascule.model.transformer import Transformer

V3 = ModelConfig(preset="v3")
QWEN3_0_6B = ModelConfig(
    preset="custom", attention="gqa", ffn="swiglu", qk_norm=True, vocab_size=151936, hidden_size=1024, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072, tie_word_embeddings=True,
)  # fmt: skip


def test_v3_has_deepseek_v3s_published_size() -> None:
    assert (
        count.parameters(V3) + 58 * 256 == 671_026_419_200
    )  # the published sum counts the router biases
    assert round(count.active_parameters(V3) / 1e9, 1) == 37.6
    assert count.moe_layers(V3) == 58


def test_v3s_cache_is_the_papers_70_kilobytes_a_token() -> None:
    assert count.kv_cache_bytes_per_token(V3) == 70_272


def test_v3_trains_at_the_papers_250_gigaflops_a_token() -> None:
    assert count.train_flops_per_token(V3, 4096) / 1e9 == pytest.approx(250, rel=0.005)


def test_v3s_prediction_layer_weighs_14_billion_with_its_copies() -> None:
    copies = 2 * V3.vocab_size * V3.hidden_size
    extra = count.parameters(V3, mtp=True) - count.parameters(V3) + copies
    assert extra / 1e9 == pytest.approx(14, rel=0.05)


def test_qwen3_0_6b_has_its_published_size() -> None:
    assert count.parameters(QWEN3_0_6B) == 596_049_920


SHAPES = {
    "tick": ModelConfig(preset="tick"),
    "nano": ModelConfig(preset="nano"),
    "mini": ModelConfig(preset="mini"),
    "untied": ModelConfig(
        preset="tick", tie_word_embeddings=False, q_lora_rank=12, n_shared_experts=2
    ),
    "gqa_bias_without_output": ModelConfig(
        preset="tick",
        attention="gqa",
        num_key_value_heads=2,
        attention_bias=True,
        attention_output_bias=False,
    ),
    "mla_with_bias": ModelConfig(preset="tick", attention_bias=True, q_lora_rank=12),
    "gqa": ModelConfig(
        preset="tick", attention="gqa", ffn="swiglu", num_key_value_heads=2, qk_norm=True
    ),
    "gqa_with_bias": ModelConfig(
        preset="tick", attention="gqa", num_key_value_heads=2, attention_bias=True
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_count_is_the_modules_own(name: str) -> None:
    config = SHAPES[name]
    with torch.device("meta"):
        model = Transformer(config)
    assert count.parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    cache = model.new_cache(3, 5)
    assert cache.memory_bytes == 3 * 5 * count.kv_cache_bytes_per_token(config, bytes_per_element=4)


@pytest.mark.parametrize("name", ["tick", "untied", "gqa"])
def test_forward_flops_are_what_torch_counts(name: str) -> None:
    """Attention is compared at full length: torch counts the whole square of an eager causal product."""
    config = SHAPES[name]
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with (
        kernels.plain(),  # torch counts its own operators only
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(tokens)
    assert counter.get_total_flops() == 32 * count.forward_flops_per_token(config, context=16)


def test_experts_that_rest_are_not_active() -> None:
    nano = ModelConfig(preset="nano")
    idle = (
        2 * 3 * 3 * nano.hidden_size * nano.moe_intermediate_size
    )  # layers x resting experts x three matrices
    assert count.parameters(nano) - count.active_parameters(nano) == idle


def test_counting_needs_no_torch() -> None:
    code = (
        "import sys, bascule.model.count, bascule.model.hf_config; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
