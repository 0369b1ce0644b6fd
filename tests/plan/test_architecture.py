"""Counts are exact: they agree with the model room's and with published figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bascule.config.model import PRESETS, ModelConfig
from bascule.errors import RecipeError
from bascule.model import count
from bascule.plan.architecture import from_config
from bascule.plan.fit import DATA
from bascule.plan.models import from_hugging_face, model_named
from bascule.plan.runs_table import number, read_rows, shape_of


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_planner_and_the_model_count_the_same_parameters(preset: str) -> None:
    config = ModelConfig.model_validate({"preset": preset})
    shape = from_config(config)
    assert shape.parameters == pytest.approx(count.parameters(config, mtp=True), rel=0.01)


def test_deepseek_v3_is_the_published_model() -> None:
    shape = model_named("deepseek-v3")
    assert shape.train_flops(4096) / 1e9 == pytest.approx(
        260.6, rel=0.001
    )  # NVIDIA's own pair of tokens/s and TFLOPS
    assert shape.attention_weights / 1e6 == pytest.approx(187.1, abs=0.1)
    assert shape.cache_bytes() == 70_272
    assert model_named("llama-3.1-70b").cache_bytes() == 327_680
    assert model_named("llama-3.1-405b").cache_bytes() == 516_096


def test_flops_agree_with_every_published_row_without_a_window() -> None:
    checked = 0
    for row in read_rows(DATA / "runs.csv"):
        published = number(row, "d_flops_per_token_G")
        if (
            row["tier"] not in ("A", "A-")
            or not published
            or "window" in row["arch_json"]
            or "local" in row["arch_json"]
        ):
            continue
        if row["model"].startswith(
            ("Mistral", "Gemma2")
        ):  # these look back 4,096 tokens; the table counts them in full
            continue
        assert shape_of(row).train_flops(int(row["seq_len"])) / 1e9 == pytest.approx(
            published, rel=0.02
        ), row["id"]
        checked += 1
    assert checked > 150


def test_a_hugging_face_config_is_read(tmp_path: Path) -> None:
    raw = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    assert model_named(str(path)).parameters == pytest.approx(30.5e9, rel=0.01)  # Qwen3-30B-A3B


@pytest.mark.parametrize(
    ("raw", "total_b", "windowed", "dense"),
    [
        ({"model_type": "llama4", "text_config": {"hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 8192, "vocab_size": 202048}}, 400, 36, 24),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024, "sliding_window_pattern": 6, "vocab_size": 262208}}, 27, 52, 62),
        ({"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "experts_per_token": 4, "sliding_window": 128, "vocab_size": 201088}, 117, 18, 0),
        ({"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096, "vocab_size": 32000}, 7.24, 32, 32),
        ({"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "sliding_window": 131072, "use_sliding_window": False, "vocab_size": 152064}, 7.6, 0, 28),
        ({"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48, "vocab_size": 50257}, 1.56, 0, 48),
        ({"model_type": "phi", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 51200}, 1.418, 0, 24),
        ({"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True, "new_decoder_architecture": False, "vocab_size": 65024}, 6.92, 0, 32),
        ({"model_type": "arcee", "hidden_size": 2560, "intermediate_size": 18432, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}, 4.023, 0, 32),
    ],
    ids=["llama4", "gemma3", "gpt-oss", "mistral", "qwen2", "gpt2", "phi", "falcon", "arcee"],
)  # fmt: skip
def test_families_spell_their_sizes_differently(
    raw: dict[str, object], total_b: float, windowed: int, dense: int
) -> None:
    shape = from_hugging_face(raw, name="one")
    assert shape.parameters / 1e9 == pytest.approx(total_b, rel=0.02)
    assert (shape.local_layers, shape.dense_layers) == (windowed, dense)


def test_an_index_that_looks_a_long_context_over_costs_more_than_what_it_selects() -> None:
    sparse, dense = model_named("deepseek-v3.2"), model_named("deepseek-v3")
    assert sparse.attention_flops(131072) < dense.attention_flops(131072) / 4
    assert sparse.attention_flops(131072) > 2 * replace(sparse, index_width=0).attention_flops(
        131072
    )


@pytest.mark.parametrize(
    ("more", "local", "window"),
    [
        ({"full_attention_interval": 4}, 18, 128),
        ({"attn_type_list": [0, 0, 0, 1] * 6}, 18, 128),
        ({"sliding_window_pattern": "LLLG", "sliding_window": 4096}, 18, 4096),
        ({"layer_types": ["full_attention", "linear_attention"] * 12, "full_attention_interval": 4}, 12, 128),
    ],
)  # fmt: skip
def test_layers_that_see_less_are_told_in_every_houses_words(
    more: dict[str, object], local: int, window: int
) -> None:
    shape = from_hugging_face({**PLAIN, **more}, name="one")
    assert (shape.local_layers, shape.window) == (local, window)


PLAIN = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "intermediate_size": 8192, "vocab_size": 32000}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model_type": "jamba", "mamba_d_state": 16}, r"another kind \(mamba_d_state\)"),
        ({"model_type": "recurrent_gemma", "lru_width": 2560}, "another kind"),
        ({"layer_types": ["conv", "full_attention"]}, r"another kind \(conv\)"),
        ({"model_type": "longcat_flash"}, r"another kind \(longcat_flash\)"),
        ({"model_type": "bert"}, "an encoder"),
        ({"is_encoder_decoder": True}, "an encoder"),
        ({"intermediate_size": [8192, 16384]}, r"intermediate_size = \[8192, 16384\], one number"),
    ],
)
def test_a_model_whose_layers_are_not_counted_is_refused(
    more: dict[str, object], says: str
) -> None:
    assert from_hugging_face(PLAIN, name="one").layers == 24
    with pytest.raises(RecipeError, match=says):
        from_hugging_face({**PLAIN, **more}, name="one")


def test_a_config_without_sizes_says_what_is_missing() -> None:
    with pytest.raises(RecipeError, match="hidden_size"):
        from_hugging_face({}, name="empty")


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'deepseek-v3'"):
        model_named("deepseek-v33")


def test_a_model_may_be_a_table_of_sizes(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        "hidden = 4096\nlayers = 32\nheads = 32\nkv_heads = 8\nhead_dim = 128\nffn = 14336\nvocab = 128256\n"
    )
    assert model_named(str(path)).parameters == model_named("llama-3.1-8b").parameters
    path.write_text("hiden = 4096\n")
    with pytest.raises(RecipeError, match="Did you mean 'hidden'"):
        model_named(str(path))
    path.write_text("hidden = 4096\n")
    with pytest.raises(RecipeError, match="at least hidden"):
        model_named(str(path))


def test_public_models_have_the_parameter_counts_they_are_named_for() -> None:
    import csv

    from bascule.plan.fit import DATA
    from bascule.plan.models import named

    with (DATA / "models.csv").open(encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            shape = named()[row["name"]]
            assert abs(shape.parameters / 1e9 / float(row["total_B"]) - 1) < 0.03, row["name"]
            if row["active_B"]:
                used = (shape.active_weights - shape.mtp_layers * shape.mtp_weights) / 1e9
                assert abs(used / float(row["active_B"]) - 1) < 0.12, row["name"]
