"""A transformers model and its bascule twin give the same logits, whichever of the two is written to disk first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from bascule.config.model import ModelConfig
from bascule.model import weights
from bascule.model.transformer import Transformer

BOUND = 1e-4  # of the logits' RMS; fp32 on both sides

DEEPSEEK: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=24, q_lora_rank=None, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=4,
    topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.0, norm_topk_prob=True, max_position_embeddings=64,
    tie_word_embeddings=False,
)  # fmt: skip
QWEN: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False, rope_theta=1e6,
)  # fmt: skip

YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

TWINS = {
    "deepseek_v3_yarn": DeepseekV3Config(
        **DEEPSEEK, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 8.0}
    ),
    "qwen3_yarn": Qwen3Config(**{**QWEN, "rope_theta": None}, rope_parameters=YARN),
    "qwen2_yarn_own_temperature": Qwen2Config(
        **{**QWEN, "rope_theta": None},
        rope_parameters={**YARN, "attention_factor": 1.3, "truncate": False},
    ),
    "llama3": LlamaConfig(**{**QWEN, "rope_theta": None}, rope_parameters=LLAMA3),
    "deepseek_v3": DeepseekV3Config(**DEEPSEEK),
    "deepseek_v3_q_lora_two_shared": DeepseekV3Config(
        **{**DEEPSEEK, "q_lora_rank": 20, "routed_scaling_factor": 2.5, "n_shared_experts": 2}
    ),
    "deepseek_v3_tied_unnormalised": DeepseekV3Config(
        **{**DEEPSEEK, "tie_word_embeddings": True, "norm_topk_prob": False, "attention_bias": True}
    ),
    "deepseek_v3_dense": DeepseekV3Config(**{**DEEPSEEK, "first_k_dense_replace": 3}),
    "qwen2": Qwen2Config(**QWEN),
    "qwen3": Qwen3Config(**QWEN),
    "qwen3_tied": Qwen3Config(**{**QWEN, "tie_word_embeddings": True}),
    "llama": LlamaConfig(**{**QWEN, "rms_norm_eps": 1e-5}),
    "llama_with_bias": LlamaConfig(**{**QWEN, "num_key_value_heads": 6, "attention_bias": True}),
}


def _randomise(named: Any) -> None:
    """Numbers far from the usual first values: with a deviation of 0.02 even a broken rotation stays within 5e-2."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in named:
            noise = torch.randn(tensor.shape, generator=generator)
            is_gain = name.endswith("norm.weight")
            tensor.copy_(
                1 + 0.2 * noise
                if is_gain
                else noise * (0.3 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5)
            )


def _difference(ours: Transformer, theirs: PreTrainedModel) -> float:
    """Largest logit difference over the logits' RMS."""
    tokens = torch.randint(0, 97, (3, 29), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits.double()
        found = ours(tokens).logits_BTV.double()
    return float((found - expected).abs().max() / expected.pow(2).mean().sqrt())


def _theirs(config: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    _randomise(list(model.named_parameters()) + _router_biases(model))
    return model


def _router_biases(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if name.endswith("e_score_correction_bias")
    ]


@pytest.mark.parametrize("name", TWINS)
def test_a_transformers_folder_loads_with_equal_logits(name: str, tmp_path: Path) -> None:
    theirs = _theirs(TWINS[name])
    theirs.save_pretrained(tmp_path)
    ours, config = weights.load_hf(tmp_path)
    assert _difference(ours, theirs) < BOUND
    assert config.tie_word_embeddings == TWINS[name].tie_word_embeddings


@pytest.mark.parametrize("name", TWINS)
def test_transformers_loads_our_folder_with_equal_logits(name: str, tmp_path: Path) -> None:
    _theirs(TWINS[name]).save_pretrained(tmp_path / "theirs")
    ours, config = weights.load_hf(tmp_path / "theirs")
    _randomise(list(ours.named_parameters()) + _router_biases(ours))
    weights.save_hf(
        ours, config, tmp_path / "ours", special_ids={"bos_token_id": 1, "eos_token_id": 2}
    )
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    assert _difference(ours, theirs) < BOUND
    assert theirs.generation_config.eos_token_id == 2


def test_the_router_bias_decides_who_is_chosen(tmp_path: Path) -> None:
    """The twins above would agree with a bias that both ignore; here it must matter."""
    theirs = _theirs(TWINS["deepseek_v3"])
    theirs.save_pretrained(tmp_path)
    ours, _ = weights.load_hf(tmp_path)
    for moe in ours.moe_layers():
        moe.gate.e_score_correction_bias.zero_()
    assert _difference(ours, theirs) > 100 * BOUND


@pytest.mark.parametrize("preset", ["tick", "nano"])
def test_our_presets_load_in_transformers(preset: str, tmp_path: Path) -> None:
    config = ModelConfig(preset=preset, vocab_size=97)
    ours = Transformer(config)
    weights.initialise(ours, seed=3)
    weights.save_hf(ours, config, tmp_path)
    assert _difference(ours, AutoModelForCausalLM.from_pretrained(tmp_path)) < BOUND


def test_an_untied_export_of_a_tied_model_has_equal_logits(tmp_path: Path) -> None:
    config = ModelConfig(preset="tick", vocab_size=97)
    ours = Transformer(config)
    weights.initialise(ours, seed=3)
    weights.save_hf(ours, config, tmp_path, untied=True)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert _difference(ours, AutoModelForCausalLM.from_pretrained(tmp_path)) < BOUND
    assert (
        _difference(weights.load_hf(tmp_path)[0], AutoModelForCausalLM.from_pretrained(tmp_path))
        < BOUND
    )
