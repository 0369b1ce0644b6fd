"""A run that starts from an existing model: its own tokenizer and weights, recorded, trained on, exported, opened again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bascule.cli import main
from bascule.config.load import load_recipe
from bascule.errors import RecipeError, UsageError
from bascule.ledger import last, read_ledger
from bascule.records import ModelOrigin, RunFinished, StepStats
from bascule.stages import origin
from tests.existing import make_llama

RECIPE = """
pools.here.accelerator = "cpu"
model.from = "{model}"
model.max_position_embeddings = 96
data = {{ train_problems = 64, eval_problems = 4, tasks = [{{ name = "chain_sum", options = {{ min_terms = 2, max_terms = 2 }} }}] }}
sft = {{ steps = 3, batch_sequences = 8, muon_learning_rate = 0.0 }}
grpo = {{ steps = 2, prompts = 2, group_size = 2, max_completion_tokens = 8, min_start_pass_at_16 = 0.0 }}
train.snapshot_every_steps = 2
qualify = {{ required = false, time_limit_s = 0.1 }}
evaluate.samples = 1
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    path = folder / "grow.toml"
    path.write_text(RECIPE.format(model=make_llama(folder / "llama")))
    return path


def test_the_recipe_takes_the_models_shape(recipe: Path) -> None:
    model = origin.resolve(load_recipe(recipe)).model
    assert (model.attention, model.ffn, model.hidden_size) == ("gqa", "swiglu", 48)
    assert model.max_position_embeddings == 96


def test_a_size_that_the_model_does_not_have_is_refused(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.hidden_size = 64 .* has 48"):
        origin.resolve(load_recipe(recipe, ["model.hidden_size=64"]))


def test_a_preset_beside_from_is_refused(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="brings its own shape"):
        load_recipe(recipe, ["model.preset=nano"])


def test_the_run_starts_from_it_and_its_own_model_opens_again(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bascule.cli", "run", str(recipe), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "grow"
    records = read_ledger(folder / "ledger.jsonl")
    began = last(records, ModelOrigin)
    assert began and began.family == "llama" and len(began.sha256) == 64
    assert last(records, RunFinished)
    assert {one.phase for one in records if isinstance(one, StepStats)} == {"sft", "grpo"}
    shape = json.loads((folder / "model" / "config.json").read_text())
    source = json.loads((recipe.parent / "llama" / "config.json").read_text())
    assert (shape["model_type"], shape["vocab_size"]) == ("llama", source["vocab_size"])
    assert main(["evaluate", str(folder)]) == 0
    assert main(["chat", str(folder), "1+2=?"]) == 0


@pytest.mark.slow
def test_a_source_that_changed_is_refused_on_resume(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bascule.cli", "run", str(recipe), "--out", str(tmp_path)]
    command += ["--set", 'train.phases=["sft"]', "--set", "sft.steps=1"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    folder = tmp_path / "grow"
    ledger = folder / "ledger.jsonl"
    kept = [
        line
        for line in ledger.read_text().splitlines()
        if '"kind":"run_finished"' not in line.replace(" ", "")
    ]
    changed = [
        line.replace(json.loads(line)["sha256"], "0" * 64) if '"model_origin"' in line else line
        for line in kept
    ]
    ledger.write_text("\n".join(changed) + "\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "its files changed" in done.stderr


def test_the_server_speaks_with_a_foreign_vocabulary(recipe: Path, tmp_path: Path) -> None:
    """Through the server's own reader of prompts: the model's template, and its control tokens refused as text."""
    from bascule.data.text_tokenizer import open_tokenizer
    from bascule.serve.bodies import Message
    from bascule.serve.text import chat_prompt

    tokenizer = open_tokenizer(recipe.parent / "llama")
    ids = chat_prompt([Message(role="user", content="1+2=?")], tokenizer)
    assert ids == tokenizer.encode(tokenizer.prompt("1+2=?"))
    with pytest.raises(UsageError, match="control token"):
        chat_prompt([Message(role="user", content="a<|im_end|>")], tokenizer)
