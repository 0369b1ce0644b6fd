"""Every recipe in runs/ loads, and its shape and settings fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.config.load import load_recipe

RUNS = Path(__file__).resolve().parents[1] / "runs"


@pytest.mark.parametrize("name", sorted(path.stem for path in RUNS.glob("*.toml")))
def test_a_recipe_loads_and_its_rows_fit_the_model(name: str) -> None:
    recipe = load_recipe(RUNS / f"{name}.toml")
    positions = recipe.model.max_position_embeddings
    assert recipe.grpo.max_completion_tokens < positions
    assert recipe.sft.pack_tokens <= positions
    if "pretrain" in recipe.train.phases:
        assert recipe.pretrain.sequence_length <= positions


def test_nano_is_the_demos_learning_so_that_its_figures_are_its_own() -> None:
    demo, nano = (load_recipe(RUNS / f"{name}.toml") for name in ("demo", "nano"))
    ours = ("seed", "threads", "model", "data", "sft", "grpo", "train", "guard", "evaluate")
    for section in ours:
        assert getattr(demo, section) == getattr(nano, section), section
    assert len(nano.pools) == 1
