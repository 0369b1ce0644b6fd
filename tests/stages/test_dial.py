"""The dial: every depth gives a model that can be built, larger ones learn slower in larger batches, and what is set stays."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from bascule.config.load import load_recipe, recipe_from
from bascule.config.model import ModelConfig
from bascule.config.recipe import Recipe
from bascule.errors import RecipeError
from bascule.model import count
from bascule.records import DialTurned
from bascule.report.card import card
from bascule.report.story import derived, sentences
from bascule.stages import dial, origin

RUNS = Path(__file__).resolve().parents[2] / "runs"


def recipe(depth: int, **pretrain: object):
    raw = {
        "name": "dial", "pools": {"here": {"accelerator": "cpu"}}, "model": {"depth": depth, "vocab_size": 4096},
        "train": {"phases": ["pretrain"]}, "pretrain": {"data": "x", **pretrain},
    }  # fmt: skip
    return recipe_from(raw, source="test")


def turn(recipe: Recipe) -> tuple[Recipe, DialTurned]:
    """As for a tokenizer of the size that the recipe names."""
    return dial.turn(recipe, recipe.model.vocab_size)


@pytest.mark.parametrize("depth", range(1, 33))
def test_every_depth_is_a_shape_whose_active_experts_equal_a_dense_layer(depth: int) -> None:
    model = ModelConfig(depth=depth)
    assert model.num_hidden_layers == depth and model.hidden_size == 64 * depth
    assert model.qk_nope_head_dim + model.qk_rope_head_dim == model.v_head_dim
    active = (model.num_experts_per_tok + model.n_shared_experts) * model.moe_intermediate_size
    assert active == model.intermediate_size


def test_twelve_layers_give_what_the_formulas_give_by_hand() -> None:
    turned, said = turn(recipe(12, sequence_length=1024))
    model, got = turned.model, turned.pretrain
    tokens = 20 * (count.active_parameters(model) - 4096 * 768)
    flops = tokens * count.train_flops_per_token(model, 1024)
    assert got.learning_rate == pytest.approx(0.3118 * flops**-0.125, rel=5e-3)
    assert got.batch_sequences == round(0.2920 * flops**0.3271 / 1024)
    assert 0 <= got.steps * got.batch_sequences * 1024 - tokens < got.batch_sequences * 1024
    lines = dial.lines(said)
    assert "width 768" in lines[0] and f"{tokens:,} in all" in lines[2]
    assert all("arXiv" in line or "Jordan" in line for line in lines[1:])


def test_deeper_means_more_tokens_larger_batches_and_a_smaller_rate() -> None:
    turned = [turn(recipe(depth))[0].pretrain for depth in (4, 8, 16, 24)]
    for small, large in pairwise(turned):
        assert large.batch_sequences > small.batch_sequences
        assert large.learning_rate < small.learning_rate
        assert large.steps * large.batch_sequences > small.steps * small.batch_sequences


def test_what_the_recipe_sets_is_left_alone_and_said() -> None:
    turned, said = turn(recipe(4, steps=7, learning_rate=0.001))
    assert (turned.pretrain.steps, turned.pretrain.learning_rate) == (7, 0.001)
    assert turned.pretrain.batch_sequences == turn(recipe(4))[0].pretrain.batch_sequences
    assert "the recipe says 7, which stays" in dial.lines(said)[2]


def test_a_batch_of_the_recipes_own_leaves_the_tokens_as_they_were() -> None:
    ruled, own = (turn(recipe(6, **keys))[0].pretrain for keys in ({}, {"batch_sequences": 3}))
    of_both = [one.steps * one.batch_sequences for one in (ruled, own)]
    assert abs(of_both[0] - of_both[1]) <= ruled.batch_sequences


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
    turned = turn(recipe(6))[0]
    again = recipe_from(turned.model_dump(), source="again")
    assert again == turned and turn(again)[0] == turned


def test_the_prediction_layer_comes_with_size_and_only_where_a_family_has_it() -> None:
    for depth in (1, 11, 12, 20):
        shape = ModelConfig(depth=depth, vocab_size=32768)
        assert shape.num_nextn_predict_layers == (count.parameters(shape) > 5e8)
    assert ModelConfig(depth=12, num_nextn_predict_layers=0).num_nextn_predict_layers == 0
    assert ModelConfig(depth=12, ffn="swiglu").num_nextn_predict_layers == 0
    assert "a prediction layer" in turn(recipe(12))[1].shape
    assert "a prediction layer" not in turn(recipe(11))[1].shape


def preset(name: str, phases: tuple[str, ...], **sections: object) -> Recipe:
    raw = {
        "name": "p", "pools": {"here": {"accelerator": "cpu"}}, "model": {"preset": name},
        "train": {"phases": phases}, "pretrain": {"data": "x"}, **sections,
    }  # fmt: skip
    return recipe_from(raw, source="test")


def test_a_preset_derives_what_training_is_left_to_say_and_tells_its_shape() -> None:
    before = preset("mini", ("pretrain",))
    after, said = turn(before)
    assert said.shape.startswith(
        "8 layers, width 512, vocabulary 16,384, 8 heads of 128, latent 512, 16 experts"
    )
    tokens = 20 * (count.active_parameters(before.model) - 16384 * 512)
    assert after.pretrain.steps * after.pretrain.batch_sequences * 256 == pytest.approx(tokens, rel=0.01)  # fmt: skip
    assert 0 < after.pretrain.learning_rate < before.pretrain.learning_rate
    assert after.model == before.model
    dense = before.model_copy(update={"model": ModelConfig(attention="gqa", ffn="swiglu")})
    shape = turn(dense)[1].shape
    assert "latent" not in shape and "experts" not in shape


def test_after_pretraining_sft_takes_a_tenth_and_grpo_what_was_published_for_the_size() -> None:
    whole = ("pretrain", "sft", "grpo")
    got = turn(preset("mini", whole, pretrain={"data": "x", "learning_rate": 1e-3}))[0]
    assert (got.sft.learning_rate, got.sft.muon_learning_rate) == (1e-4, 2e-3)
    assert got.grpo.learning_rate == 1e-5
    assert turn(preset("v3", whole))[0].grpo.learning_rate == 1e-6
    stated = preset("mini", whole, sft={"learning_rate": 5e-4}, grpo={"learning_rate": 2e-5})
    kept = turn(stated)[0]
    assert (kept.sft.learning_rate, kept.grpo.learning_rate) == (5e-4, 2e-5)
    alone = preset("mini", ("sft",))
    assert turn(alone)[0].sft == alone.sft  # it learns from nothing: no share of anything


@pytest.mark.parametrize("name", ["tick", "nano"])
def test_models_nobody_published_keep_the_rates_that_were_measured_here(name: str) -> None:
    before = preset(name, ("pretrain", "sft", "grpo"))
    after = turn(before)[0]
    assert (after.sft, after.grpo) == (before.sft, before.grpo)


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.stem)
def test_no_recipe_in_runs_is_changed_but_the_one_that_leaves_it_to_the_dial(path: Path) -> None:
    before = load_recipe(path)
    after = turn(before)[0] if before.model.from_ is None else before
    assert (after == before) == (path.stem != "small")
    assert after.sft == before.sft and after.grpo == before.grpo


def test_the_story_tells_what_was_derived_and_from_which_rule_but_not_what_was_stated() -> None:
    said = turn(recipe(4, steps=7))[1]
    text = derived(said)
    assert "the model's sizes (4 layers" in text and "pretrain.learning_rate = " in text
    assert "2401.02954" in text and "pretrain.steps" not in text
    (told,) = sentences([said])
    assert told.text.startswith("Depth 4 gave")
    assert derived(turn(preset("nano", ("sft",)))[1]) == ""
    assert "Depth 4 gave" in card([said], name="x", family="y", parameters=1)


def test_how_often_the_text_will_be_read_is_said_and_past_four_times_that_it_teaches_less() -> None:
    short = recipe(4, steps=10, batch_sequences=2, sequence_length=50)  # 1,000 tokens
    assert origin._rounds(short, 500) == "text: 1,000 tokens will be read, all of it 2.0 times"
    assert "less and less (arXiv 2305.16264)" in origin._rounds(short, 200)


def test_the_shape_is_told_with_the_vocabulary_that_the_model_will_have() -> None:
    asked = preset("tick", ("sft",))
    resolved, said = origin.resolve_and_derive(asked)
    real = origin.tokenizer(asked).vocab_size
    assert real != asked.model.vocab_size, "or this test shows nothing"
    true = count.parameters(asked.model.model_copy(update={"vocab_size": real}))
    assert said and f"vocabulary {real}" in said.shape and f"{true:,} parameters" in said.shape
    assert resolved.model == asked.model
