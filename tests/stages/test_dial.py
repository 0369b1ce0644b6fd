"""The dial: every depth gives a model that can be built, larger ones learn slower in larger batches, and what is set stays."""

from __future__ import annotations

from itertools import pairwise

import pytest

from bascule.config.load import recipe_from
from bascule.config.model import ModelConfig
from bascule.errors import RecipeError
from bascule.model import count
from bascule.stages import dial


def recipe(depth: int, **pretrain: object):
    raw = {
        "name": "dial", "pools": {"here": {"accelerator": "cpu"}}, "model": {"depth": depth, "vocab_size": 4096},
        "train": {"phases": ["pretrain"]}, "pretrain": {"data": "x", **pretrain},
    }  # fmt: skip
    return recipe_from(raw, source="test")


@pytest.mark.parametrize("depth", range(1, 33))
def test_every_depth_is_a_shape_whose_active_experts_equal_a_dense_layer(depth: int) -> None:
    model = ModelConfig(depth=depth)
    assert model.num_hidden_layers == depth and model.hidden_size == 64 * depth
    assert model.qk_nope_head_dim + model.qk_rope_head_dim == model.v_head_dim
    active = (model.num_experts_per_tok + model.n_shared_experts) * model.moe_intermediate_size
    assert active == model.intermediate_size


def test_twelve_layers_give_what_the_formulas_give_by_hand() -> None:
    turned, lines = dial.turn(recipe(12, sequence_length=1024))
    model, got = turned.model, turned.pretrain
    tokens = 20 * (count.active_parameters(model) - 4096 * 768)
    flops = tokens * count.train_flops_per_token(model, 1024)
    assert got.learning_rate == pytest.approx(0.3118 * flops**-0.125, rel=5e-3)
    assert got.batch_sequences == round(0.2920 * flops**0.3271 / 1024)
    assert 0 <= got.steps * got.batch_sequences * 1024 - tokens < got.batch_sequences * 1024
    assert "width 768" in lines[0] and f"{tokens:,} tokens" in lines[1]


def test_deeper_means_more_tokens_larger_batches_and_a_smaller_rate() -> None:
    turned = [dial.turn(recipe(depth))[0].pretrain for depth in (4, 8, 16, 24)]
    for small, large in pairwise(turned):
        assert large.batch_sequences > small.batch_sequences
        assert large.learning_rate < small.learning_rate
        assert large.steps * large.batch_sequences > small.steps * small.batch_sequences


def test_what_the_recipe_sets_is_left_alone_and_said() -> None:
    turned, lines = dial.turn(recipe(4, steps=7, learning_rate=0.001))
    assert (turned.pretrain.steps, turned.pretrain.learning_rate) == (7, 0.001)
    assert "the recipe says 7" in lines[1]


def test_depth_beside_a_preset_is_refused_and_a_size_may_be_overridden() -> None:
    with pytest.raises(RecipeError, match="leave preset out"):
        recipe_from(
            {
                "name": "x",
                "pools": {"a": {"accelerator": "cpu"}},
                "model": {"depth": 4, "preset": "nano"},
            },
            source="t",
        )
    assert ModelConfig(depth=4, n_routed_experts=8).n_routed_experts == 8


def test_a_resolved_recipe_reads_back_as_it_was() -> None:
    turned = dial.turn(recipe(6))[0]
    assert recipe_from(turned.model_dump(), source="again") == turned


def test_the_prediction_layer_comes_with_size_and_only_where_a_family_has_it() -> None:
    for depth in (1, 11, 12, 20):
        shape = ModelConfig(depth=depth, vocab_size=32768)
        assert shape.num_nextn_predict_layers == (count.parameters(shape) > 5e8)
    assert ModelConfig(depth=12, num_nextn_predict_layers=0).num_nextn_predict_layers == 0
    assert ModelConfig(depth=12, ffn="swiglu").num_nextn_predict_layers == 0
    assert "a prediction layer" in dial.turn(recipe(12))[1][0]
    assert "a prediction layer" not in dial.turn(recipe(11))[1][0]


def test_a_preset_says_its_shape_and_what_the_rules_would_take_and_changes_nothing() -> None:
    raw = {
        "name": "p", "pools": {"here": {"accelerator": "cpu"}}, "model": {"preset": "mini"},
        "train": {"phases": ["pretrain"]}, "pretrain": {"data": "x"},
    }  # fmt: skip
    before = recipe_from(raw, source="test")
    after, lines = dial.turn(before)
    assert after == before
    assert lines[0].startswith(
        "preset mini: 8 layers, width 512, 8 heads of 128, latent 512, 16 experts"
    )
    assert "(the recipe says 1000)" in lines[1]
    dense = recipe_from({**raw, "model": {"attention": "gqa", "ffn": "swiglu"}}, source="test")
    assert "latent" not in dial.turn(dense)[1][0] and "experts" not in dial.turn(dense)[1][0]
