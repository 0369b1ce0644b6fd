"""`bascule plan RECIPE`: with a run's folder, as a page, and with words that would go unheard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bascule.cli import main
from bascule.config.recipe import Recipe
from bascule.folder import RunFolder
from bascule.ledger import Ledger
from bascule.records import RecipeResolved, StepStats

RECIPE = '[pools.here]\naccelerator = "cpu"\nprice_per_hour = 2.0\n[sft]\nsteps = 100\n[train]\nphases = ["sft"]\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    return path


def run_of(folder: Path, seconds: float, **sft: int) -> Path:
    """A run of the same recipe that took so long a step."""
    place = RunFolder(folder)
    place.create()
    ledger = Ledger(place.ledger)
    run = Recipe.model_validate(
        {"name": "r", "pools": {"here": {"accelerator": "cpu"}}, "train": {"phases": ["sft"]}, "sft": sft}
    )  # fmt: skip
    ledger.append(RecipeResolved(recipe_sha256="0", recipe=json.loads(run.model_dump_json())))
    for step in range(1, 10):
        ledger.append(
            StepStats(pool="here", step=step, phase="sft", loss=1.0, grad_norm=1.0, learning_rate=1e-3, tokens=9, seconds=seconds)
        )  # fmt: skip
    return folder


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["pools"][0]


def test_steps_that_a_run_recorded_replace_the_estimate(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = asked(capsys, str(recipe))
    found = asked(capsys, str(recipe), "--chips", str(run_of(tmp_path / "run", 0.7)))
    assert found["train_s"] == pytest.approx(100 * 0.7)
    assert "step times of sft" in found["basis"]
    assert found["train_s_high"] / found["train_s_low"] < plain["train_s_high"] / plain["train_s_low"]  # fmt: skip


def test_a_run_with_other_batches_says_nothing_of_this_recipes_steps(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(tmp_path / "run", 700.0, batch_sequences=7)
    assert "step times" not in asked(capsys, str(recipe), "--chips", str(folder))["basis"]


def test_the_pools_have_a_page(recipe: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    assert main(["plan", str(recipe), "--html", str(page)]) == 0
    words = page.read_text()
    assert words.count("aria-label='stacked bars'") == 2 and words.count("<u style=") == 1
    assert "here" in words and "GiB" in words and "USD" in words and "http" not in words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["RECIPE", "--html", "."], "'.' is a folder; give the page a file's name"),
        (["RECIPE", "--train", "8 x H100, 1T tokens"], "ask one of the two"),
        (["RECIPE", "--versus", "8 x H100"], "ask one of the two"),
        (["RECIPE", "--model", "v3"], "ask one of the two"),
        (["RECIPE", "--chips", "chips.toml"], "a run's folder"),
        (["RECIPE", "RECIPE"], "takes one recipe"),
        (["RECIPE", "--kind", "train"], "bascule plan score"),
        (["--versus", "8 x H100"], "add --train"),
        (["--serve", "H20", "--versus", "8 x H100"], "compared with --train"),
        (["--anchor", "8 x H100, 9 tokens/s/chip"], "add --train or --serve"),
        (["--model", "v3"], "add --train or --serve"),
        (["score", "a.csv", "--html", "x.html"], "one table and nothing else"),
    ],
)
def test_words_that_would_go_unheard_are_refused(
    words: list[str], says: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *(str(recipe) if word == "RECIPE" else word for word in words)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
