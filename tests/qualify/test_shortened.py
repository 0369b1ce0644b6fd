"""What of a large model the quick battery examines."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.model import count
from bascule.qualify import battery, examine
from bascule.qualify.shortened import QUICK_PARAMETERS, shortened, what_is_examined

SMOLLM2 = ModelConfig(
    attention="gqa", ffn="swiglu", vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, intermediate_size=1536, tie_word_embeddings=True, max_position_embeddings=256,
)  # fmt: skip


@pytest.mark.parametrize("preset", ["tick", "nano"])
def test_a_small_model_is_examined_whole(preset: str) -> None:
    assert what_is_examined(ModelConfig(preset=preset)) is None


def test_a_large_model_is_examined_in_two_layers_of_its_own_width_and_says_so() -> None:
    part = shortened(SMOLLM2)
    assert (part.num_hidden_layers, part.vocab_size) == (2, 8192)
    assert part.hidden_size == SMOLLM2.hidden_size
    assert what_is_examined(SMOLLM2) == "2 of 30 layers, 8,192 of 49,152 tokens"


def test_a_mixture_keeps_a_dense_layer_and_two_with_experts() -> None:
    part = shortened(ModelConfig(preset="v3"))
    assert (part.num_hidden_layers, part.first_k_dense_replace) == (3, 1)
    assert part.n_routed_experts == ModelConfig(preset="v3").n_routed_experts


@given(
    layers=st.integers(1, 64),
    width=st.sampled_from([64, 256, 1024]),
    vocabulary=st.sampled_from([128, 8192, 50000]),
    ffn=st.sampled_from(["moe", "swiglu"]),
    leading=st.integers(0, 4),
)
def test_the_part_is_a_deepest_one_within_ten_million_parameters(
    layers: int, width: int, vocabulary: int, ffn: str, leading: int
) -> None:
    whole = ModelConfig(num_hidden_layers=layers, hidden_size=width, vocab_size=vocabulary, ffn=ffn, first_k_dense_replace=leading)  # fmt: skip
    part = shortened(whole)
    assert ModelConfig.model_validate(part.model_dump(by_alias=True)) == part
    assert count.parameters(part) <= count.parameters(whole)
    if part.num_hidden_layers < layers - max(leading - 1, 0):
        deeper = part.model_copy(update={"num_hidden_layers": part.num_hidden_layers + 1})
        assert count.parameters(deeper) > QUICK_PARAMETERS


def test_the_verdict_says_what_part_was_examined_and_the_full_battery_takes_all(
    tmp_path: Path,
) -> None:
    cpu = open_accelerator("cpu")
    quick = examine.open_context(cpu, SMOLLM2, quick=True, seed=0, workdir=tmp_path)
    full = examine.open_context(cpu, SMOLLM2, quick=False, seed=0, workdir=tmp_path)
    assert quick.workload.config == shortened(SMOLLM2)
    assert full.workload.config == SMOLLM2
    known = examine.examined(cpu, SMOLLM2)
    assert known.part == "2 of 30 layers, 8,192 of 49,152 tokens"
    assert examine.examined(cpu, SMOLLM2, quick=False).part is None


def test_a_larger_model_gets_a_longer_battery() -> None:
    """Regression: SmolLM2 met the three minutes made for `nano` at its third question, so that runs/distill.toml could not begin."""
    nano, smollm2 = (battery._default_limit_s(one, quick=True, wide=False) for one in (ModelConfig(preset="nano"), SMOLLM2))  # fmt: skip
    assert nano == 180.0
    assert 1800.0 < smollm2 <= 3600.0
