"""What a recipe learns from is asked for before any chip is examined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bascule.cli import main
from bascule.config.load import recipe_from
from bascule.errors import ModelFolderError, RecipeError
from bascule.folder import RunFolder
from bascule.ledger import Ledger, of_kind
from bascule.records import Warned
from bascule.stages import material, origin
from tests.existing import make_llama

SAID = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "4"}]}'


def check(**sections: Any) -> None:
    raw = {"name": "t", "pools": {"here": {"accelerator": "cpu"}}, **sections}
    material.check(recipe_from(raw, source="test"))


def test_what_is_there_passes() -> None:
    check()
    check(train={"phases": ["pretrain"]}, pretrain={"data": "x"}, data={"tasks": [{"name": "no_such_task"}]})  # fmt: skip


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"name": "chainsum"}, "There is no task 'chainsum'.*Did you mean"),
        ({"name": "no_such_module:task"}, "No module named"),
        ({"name": "jsonl:nowhere.jsonl"}, "cannot be read"),
        ({"name": "chain_sum", "options": {"terms": 3}}, "has no option 'terms'"),
    ],
)
def test_a_task_that_is_not_there_is_refused(task: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        check(data={"tasks": [task]})


def test_a_file_of_questions_is_found_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    raw = {"name": "t", "pools": {"here": {"accelerator": "cpu"}}, "data": {"tasks": [{"name": "jsonl:q.jsonl"}, {"name": "gcd"}]}}  # fmt: skip
    monkeypatch.chdir(tmp_path)
    resolved = origin.resolve(recipe_from(raw, source="test"))
    assert [one.name for one in resolved.data.tasks] == [f"jsonl:{tmp_path}/q.jsonl", "gcd"]
    monkeypatch.chdir("/")
    material.check(resolved)
    assert origin.resolve(resolved) == resolved


def test_a_task_of_the_users_own_is_found_again_whatever_it_calls_itself() -> None:
    raw = {"name": "t", "pools": {"here": {"accelerator": "cpu"}}, "data": {"tasks": [{"name": "examples.own_task:task"}]}}  # fmt: skip
    recipe = recipe_from(raw, source="test")
    material.check(recipe)
    assert material.lengths(recipe).worked


@pytest.mark.parametrize(
    ("accelerator", "says"),
    [
        ("tpu", "is not an accelerator"),
        ("cuda|tpu", "is not an accelerator"),
        ("sim:ascend-r3", "There is no fault profile"),
        ("sim:ascend-r2?onset=3", "has no knob 'onset'"),
    ],
)
def test_a_misspelt_accelerator_is_refused_before_another_pool_is_examined(
    accelerator: str, says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        check(pools={"here": {"accelerator": "cpu"}, "there": {"accelerator": accelerator}})


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (None, "cannot be read"),
        ([""], "holds no conversation"),
        (['{"messages": 3}'], "line 1"),
        ([SAID.replace("user", "wizard")], "line 1: A message has the role 'wizard'"),
        ([SAID, SAID.replace("hi", "\u4e16")], "line 2: The text holds '\u4e16'"),
        ([SAID.replace("4", " ")], "leaves nothing to learn: empty responses, 1"),
        ([SAID.replace("hi", "x" * 500)], "leaves nothing to learn: responses beyond"),
        ([SAID.replace('"4"', "null")], "no null"),
        ([SAID, SAID.replace("hi", "\\ud800")], "line 2 holds half of a surrogate pair"),
    ],
)
def test_conversations_that_are_none_are_refused(
    lines: list[str] | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    if lines is not None:
        file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(RecipeError, match=says):
        check(sft={"data": str(file)})


def test_a_folder_that_holds_another_model_than_it_says_is_refused(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    check(model={"from": str(folder)})
    config = (folder / "config.json").read_text()
    for old, new in (('hidden_layers": 2', 'hidden_layers": 3'), ('mediate_size": 96', 'mediate_size": 80')):  # fmt: skip
        (folder / "config.json").write_text(config.replace(old, new))
        with pytest.raises(ModelFolderError, match="parameters and its config.json means"):
            check(model={"from": str(folder)})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="neither model.safetensors nor"):
        check(model={"from": str(folder)})
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match="names the weight file 'model-00001"):
        check(model={"from": str(folder)})


def test_lengths_and_switches_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(RecipeError, match="pack_tokens = 4096 exceeds"):
        check(sft={"pack_tokens": 4096})
    with pytest.raises(RecipeError, match=r"max_completion_tokens=120 and the longest problem's"):
        check(grpo={"max_completion_tokens": 120})
    dense = {"preset": "nano", "attention": "gqa", "ffn": "swiglu"}
    with pytest.raises(RecipeError, match="no experts to route to"):
        check(model=dense, grpo={"router_replay": True})


def test_the_words_of_an_existing_models_tokenizer_are_counted(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama", positions=64)
    grpo = {"max_completion_tokens": 16}
    raw = {"name": "t", "pools": {"here": {"accelerator": "cpu"}}, "model": {"from": str(folder)}}
    material.check(origin.resolve(recipe_from({**raw, "grpo": grpo}, source="test")))
    with pytest.raises(RecipeError, match="positions; the model has 64"):
        material.check(origin.resolve(recipe_from({**raw, "grpo": {"max_completion_tokens": 46}}, source="test")))  # fmt: skip


def test_a_refused_run_has_not_begun_so_that_the_mended_recipe_may_have_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'pools.here.accelerator = "cpu"\nsft.data = {json.dumps(str(tmp_path / "x"))}\n')  # fmt: skip
    assert main(["run", str(recipe), "--out", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    folder = RunFolder(tmp_path / "r")
    assert not folder.recipe.exists() and not folder.ledger.exists()


def test_the_plan_counts_a_few_of_the_recipes_own_texts_in_its_own_tokens() -> None:
    raw = {"name": "t", "pools": {"here": {"accelerator": "cpu"}}}
    task = {"name": "chain_sum", "options": {"min_terms": 2, "max_terms": 2, "max_digits": 1}}
    found = material.lengths(recipe_from({**raw, "data": {"tasks": [task]}}, source="test"))
    assert found.prompt <= found.prompt_longest < found.worked <= found.worked_longest < 30
    assert found.basis == "lengths of 16 of the recipe's own problems"
    reads = {"train": {"phases": ["pretrain"]}, "pretrain": {"data": "x"}}
    assert "assumed" in material.lengths(recipe_from({**raw, **reads}, source="test")).basis


def test_more_threads_than_cores_are_a_warning_that_says_how_many_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    raw = {"name": "t", "pools": {"here": {"accelerator": "cpu"}}}
    ledger = Ledger(tmp_path / "ledger.jsonl")
    material.warn_of_threads(recipe_from({**raw, "threads": 4}, source="test"), ledger)
    assert ledger.read() == []
    material.warn_of_threads(recipe_from({**raw, "threads": 5}, source="test"), ledger)
    (told,) = of_kind(ledger.read(), Warned)
    assert told.what == "threads" and "threads = 4 is the most that helps" in told.detail
