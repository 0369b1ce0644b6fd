"""What a recipe learns from is asked for before any chip is examined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bascule.cli import main
from bascule.config.load import recipe_from
from bascule.errors import RecipeError
from bascule.folder import RunFolder
from bascule.ledger import of_kind, read_ledger
from bascule.records import Evidence, RunStopped
from bascule.stages import material


def check(tmp_path: Path, **sections: Any) -> None:
    raw = {"name": "t", "pools": {"here": {"accelerator": "cpu"}}, **sections}
    material.check(recipe_from(raw, source="test"), RunFolder(tmp_path))


def test_what_is_there_passes(tmp_path: Path) -> None:
    check(tmp_path)
    check(tmp_path, train={"phases": ["pretrain"]}, pretrain={"data": "x"}, data={"tasks": [{"name": "no_such_task"}]})  # fmt: skip


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"name": "chainsum"}, "There is no task 'chainsum'.*Did you mean"),
        ({"name": "no_such_module:task"}, "No module named"),
        ({"name": "jsonl:nowhere.jsonl"}, "cannot be read"),
        ({"name": "chain_sum", "options": {"terms": 3}}, "has no option 'terms'"),
    ],
)
def test_a_task_that_is_not_there_is_refused(
    task: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=says):
        check(tmp_path, data={"tasks": [task]})


@pytest.mark.parametrize(
    ("lines", "says"),
    [(None, "cannot be read"), ([""], "holds no conversation"), (['{"messages": 3}'], "line 1")],
)
def test_conversations_that_are_none_are_refused(
    lines: list[str] | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    if lines is not None:
        file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(RecipeError, match=says):
        check(tmp_path, sft={"data": str(file)})


def test_lengths_and_switches_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pack_tokens = 4096 exceeds"):
        check(tmp_path, sft={"pack_tokens": 4096})
    with pytest.raises(RecipeError, match=r"max_completion_tokens=120 and the longest problem's"):
        check(tmp_path, grpo={"max_completion_tokens": 120})
    dense = {"preset": "nano", "attention": "gqa", "ffn": "swiglu"}
    with pytest.raises(RecipeError, match="no experts to route to"):
        check(tmp_path, model=dense, grpo={"router_replay": True})


def test_a_run_is_refused_with_2_before_a_chip_is_examined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'pools.here.accelerator = "cpu"\nsft.data = {json.dumps(str(tmp_path / "x"))}\n')  # fmt: skip
    assert main(["run", str(recipe), "--out", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    records = read_ledger(tmp_path / "r" / "ledger.jsonl")
    assert of_kind(records, RunStopped) and not of_kind(records, Evidence)
