"""From files to a model: tokenize, pretrain, SFT on the same vocabulary, exported and opened by transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bascule.cli import main
from bascule.config.load import load_recipe
from bascule.errors import RecipeError
from bascule.ledger import last, read_ledger
from bascule.records import Evaluation, RunFinished, StepStats, TextEvaluation, TextOpened
from bascule.report.story import sentences, summary

RECIPE = """
pools.here.accelerator = "cpu"
model = {{ preset = "tick", max_position_embeddings = 96, num_nextn_predict_layers = 1 }}
train = {{ phases = ["pretrain", "sft"], snapshot_every_steps = 4, balance_loss_weight = 1e-4 }}
pretrain = {{ data = "{data}", steps = 6, batch_sequences = 4, sequence_length = 64, eval_sequences = 4 }}
sft = {{ steps = 2, batch_sequences = 4 }}
data = {{ train_problems = 32, eval_problems = 4, tasks = [{{ name = "chain_sum", options = {{ min_terms = 2, max_terms = 2 }} }}] }}
qualify = {{ required = false, time_limit_s = 0.1 }}
evaluate.samples = 1
grpo.max_completion_tokens = 8
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrain")
    library = Path(json.__file__).parent
    assert (
        main(["tokenize", str(library), "--out", str(root / "shards"), "--vocab-size", "400"]) == 0
    )
    (root / "read.toml").write_text(RECIPE.format(data=root / "shards"))
    command = [
        sys.executable,
        "-m",
        "bascule.cli",
        "run",
        str(root / "read.toml"),
        "--out",
        str(root),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def test_the_ledger_tells_the_text_and_the_bits_per_byte(finished: Path) -> None:
    records = read_ledger(finished / "read" / "ledger.jsonl")
    opened, measured = last(records, TextOpened), last(records, TextEvaluation)
    assert opened and opened.train_tokens > 0 and opened.heldout_tokens > 0
    assert measured and measured.step == 6 and 0 < measured.bits_per_byte < 12
    steps = [one for one in records if isinstance(one, StepStats)]
    assert [one.phase for one in steps] == ["pretrain"] * 6 + ["sft"] * 2
    assert all("bits_per_byte" in one.metrics for one in steps[:6])
    assert all(
        {"ahead_loss", "balance_loss", "expert_max_ratio"} <= one.metrics.keys() for one in steps
    )
    assert last(records, Evaluation) and last(records, RunFinished)
    assert f"after PRETRAIN {measured.bits_per_byte:.3f} bits per byte; after SFT pass@1" in summary(records)["headline"]  # fmt: skip
    told = [one.text for one in sentences(records)]
    assert any("(T=1, " in one and "maj@1 " in one for one in told)


def test_evaluate_measures_the_text_too_and_alone_where_no_task_was_learnt(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "read"
    shutil.copytree(finished / "read", folder)
    before = last(read_ledger(folder / "ledger.jsonl"), TextEvaluation)
    assert main(["evaluate", str(folder), "--samples", "1", "--problems", "2"]) == 0
    said = capsys.readouterr().out
    records = read_ledger(folder / "ledger.jsonl")
    text = last(records, TextEvaluation)
    assert before and text and text.after == "evaluate" and text.tokens == before.tokens
    assert f"{text.bits_per_byte:.3f} bits per byte" in said and "pass@1" in said
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["train"]["phases"] = ["pretrain"]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert main(["evaluate", str(folder)]) == 0
    assert "pass@1" not in capsys.readouterr().out
    assert main(["evaluate", str(folder), "--samples", "4"]) == 2
    assert "--samples is about problems, and this run learnt from text alone" in capsys.readouterr().err  # fmt: skip


def test_evaluate_refuses_another_text_than_the_runs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "read"
    shutil.copytree(finished / "read", folder)
    shutil.copytree(finished / "shards", tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    (tmp_path / "shards" / "index.json").write_text(json.dumps({**index, "note": 1}))
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["pretrain"]["data"] = str(tmp_path / "shards")
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert main(["evaluate", str(folder)]) == 2
    assert "is not the text this run was pretrained on" in capsys.readouterr().err


def test_transformers_opens_the_finished_model(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "read" / "model"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.vocab_size == len(tokenizer)


def test_damaged_text_ends_the_run_with_2_before_anything_starts(finished: Path) -> None:
    path = finished / "shards" / "heldout-00000.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert (
            main(["run", str(finished / "read.toml"), "--out", str(finished), "--name", "other"])
            == 2
        )
    finally:
        path.write_bytes(whole)


def test_the_phase_without_text_is_refused(finished: Path) -> None:
    with pytest.raises(RecipeError, match=r"pretrain\.data is not set"):
        load_recipe(finished / "read.toml", ["pretrain={}"])
