"""The recipe is checked once, and every refusal says the path, the value, what is allowed and the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.config.load import load_recipe, read_resolved
from bascule.config.model import PRESETS, ModelConfig
from bascule.errors import RecipeError

MINIMAL = '[pools.here]\naccelerator = "cpu"\n'


def recipe_file(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_the_file_name_is_the_default_name_and_overrides_win(tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file(tmp_path), ["train.steps=20", "pools.here.accelerator=sim:clean"]
    )
    assert (recipe.name, recipe.train.steps, recipe.pools["here"].accelerator) == (
        "mine",
        20,
        "sim:clean",
    )
    assert recipe.phase_steps() == {"sft": 20, "grpo": 0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "[sft]\nstep = 3\n", ["sft.step", "unknown key", "Did you mean 'steps'?"]),
        (MINIMAL + "[sft]\nsteps = -3\n", ["sft.steps", "greater than or equal to 0", "-3"]),
        (MINIMAL + "[sft]\nlearning_rate = '3 GiB'\n", ["sft.learning_rate", '"3 GiB"']),
        (
            MINIMAL + "[model]\npreset = 'nanu'\n",
            ["model", "'nanu' is not a preset", "Did you mean 'nano'?"],
        ),
        (MINIMAL + "[model]\nnum_experts_per_tok = 9\n", ["num_experts_per_tok=9", "exceeds"]),
        ("prefer = ['ther']\n" + MINIMAL, ["'ther' is not a pool", "here"]),
        (
            MINIMAL + "[pools.other]\nprice_per_hour = 3.0\n",
            ["pools.other.accelerator", "required"],
        ),
        ("seed = 1\n", ["pools", "required"]),
        (
            MINIMAL + "[guard]\nbudget_percent = 'f{u}l'\n",
            [
                "guard.budget_percent: must be a number",
                ", or Input should be 'full' (given: \"f{u}l\")",
            ],
        ),
        (
            MINIMAL + '[pools."a/../../b"]\naccelerator = "cpu"\n',
            ["pools.a/../../b: String should match pattern"],
        ),
        (
            MINIMAL + "[pools.my-pool]\naccelerator = 3\n",
            ["pools.my-pool.accelerator: must be text in quotes"],
        ),
    ],
)
def test_a_bad_recipe_is_refused_with_path_value_and_way_out(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as refusal:
        load_recipe(recipe_file(tmp_path, text))
    for word in words:
        assert word in str(refusal.value)


def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(recipe_file(tmp_path, "x ="))


def test_text_of_other_editors_is_read_or_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(MINIMAL.replace("\n", "\r\n").encode("utf-8-sig"))
    assert set(load_recipe(path).pools) == {"here"}
    path.write_bytes(MINIMAL.encode("utf-16"))
    with pytest.raises(RecipeError, match="Save it as UTF-8"):
        load_recipe(path)


def test_a_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    assert read_resolved(tmp_path / "recipe.json") == recipe


def test_sections_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file(tmp_path)).seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_the_fast_attention_path(preset: str) -> None:
    model = ModelConfig(preset=preset)
    if preset != "v3":  # DeepSeek-V3's own shape is what it is: 128 + 64 against 128
        assert model.qk_nope_head_dim + model.qk_rope_head_dim == model.v_head_dim
    if preset == "mini":
        assert (model.kv_lora_rank, model.qk_rope_head_dim) == (512, 64)
        assert model.num_attention_heads & (model.num_attention_heads - 1) == 0


def test_a_phase_named_twice_is_refused_and_the_phases_are_told(tmp_path: Path) -> None:
    text = MINIMAL + "[train]\nphases = ['sft', 'grpo', 'sft']\n"
    with pytest.raises(RecipeError, match="names a phase twice; each of pretrain, sft and grpo"):
        load_recipe(recipe_file(tmp_path, text))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sft.steps", "true", "must be a whole number, without quotes and without a point (given: true)"),
        ("sft.steps", '"3"', 'must be a whole number, without quotes and without a point (given: "3")'),
        ("sft.steps", "3.0", "without a point (given: 3.0)"),
        ("seed", '"0"', "must be a whole number"),
        ("sft.learning_rate", "true", "must be a number, without quotes (given: true)"),
        ("sft.learning_rate", '"0.1"', "must be a number, without quotes"),
        ("sft.learning_rate", "inf", "must be a finite number"),
        ("guard.budget_percent", "true", "must be a number"),
        ("strict", "1", "must be true or false, without quotes (given: 1)"),
        ("strict", '"yes"', "must be true or false"),
        ("sft.data", "2026", "must be text in quotes"),
        ("train.phases", '"sft"', "must be a list"),
        ("train.phases", "[]", "must hold one at least"),
        ("data.tasks", "[]", "must hold one at least"),
        ("data.tasks", '["chain_sum"]', "must be a section"),
        ("sft", "3", "must be a section"),
        ("model.preset", '["nano"]', "is not a preset"),
        ("model.depth", "true", "must be a whole number"),
        ("threads", "5000", "less than or equal to 1024 (given: 5000)"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_and_never_converted(
    tmp_path: Path, key: str, value: str, words: str
) -> None:
    with pytest.raises(RecipeError) as refusal:
        load_recipe(recipe_file(tmp_path), [f"{key}={value}"])
    assert words in str(refusal.value) and key.partition(".")[0] in str(refusal.value)


def test_what_toml_writes_for_a_type_is_taken(tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file(tmp_path),
        ["sft.learning_rate=1", "sft.steps=1_000", "guard.budget_percent=full", 'train.phases=["grpo"]', "strict=true",
         'data.tasks=[{name="chain_sum", options={min_terms=2}}]'],
    )  # fmt: skip
    assert (recipe.sft.learning_rate, recipe.sft.steps, recipe.guard.budget_percent) == (1.0, 1000, "full")  # fmt: skip
    assert (recipe.train.phases, recipe.strict) == (("grpo",), True)
    assert recipe.data.tasks[0].options == {"min_terms": 2}


def test_one_option_that_may_have_several_types_is_refused_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refusal:
        load_recipe(recipe_file(tmp_path), ['data.tasks=[{name="chain_sum", options={min_terms=[2]}}]'])  # fmt: skip
    assert str(refusal.value).count("data.tasks.0.options.min_terms") == 1
