"""What a run learns from is noted when it begins and may not change under it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bascule.config.load import recipe_from
from bascule.config.recipe import Recipe
from bascule.errors import UsageError
from bascule.ledger import Ledger, of_kind
from bascule.records import LessonsDrawn
from bascule.stages.course import course, heldout_only, same_heldout, same_lessons


def recipe(**sections: object) -> Recipe:
    data = {"train_problems": 40, "eval_problems": 8, "tasks": [{"name": "chain_sum", "options": {"max_terms": 3}}]}  # fmt: skip
    return recipe_from({"name": "t", "pools": {"a": {"accelerator": "cpu"}}, "data": data, **sections}, source="test")  # fmt: skip


def questions(path: Path, answer: int) -> dict[str, object]:
    lines = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(30)]
    lines[7]["answer"] = str(answer)
    path.write_text("\n".join(map(json.dumps, lines)))
    return {"train_problems": 20, "eval_problems": 4, "tasks": [{"name": f"jsonl:{path}"}]}


def test_the_same_lessons_are_noted_once_and_pass_ever_after(tmp_path: Path) -> None:
    asked, ledger = recipe(), Ledger(tmp_path / "ledger.jsonl")
    for _ in range(3):
        same_lessons(asked, course(asked), ledger)
    (noted,) = of_kind(ledger.read(), LessonsDrawn)
    assert (noted.train_problems, noted.heldout_problems) == (40, 8)


def test_lessons_of_every_family_are_the_same_in_another_process(tmp_path: Path) -> None:
    names = ["chain_sum", "countdown", "gcd", "letter_counting", "gym:spell_backward", "gym:list_functions"]  # fmt: skip
    asked = recipe(data={"train_problems": 24, "eval_problems": 12, "tasks": [{"name": name} for name in names]})  # fmt: skip
    same_lessons(asked, course(asked), Ledger(tmp_path / "ledger.jsonl"))
    (tmp_path / "recipe.json").write_text(json.dumps(asked.model_dump(mode="json", by_alias=True)))
    again = (
        "import json, sys; from pathlib import Path; from bascule.config.load import recipe_from; from bascule.ledger import Ledger; "
        "from bascule.stages.course import course, heldout_only, same_heldout, same_lessons; folder = Path(sys.argv[1]); "
        "asked = recipe_from(json.loads((folder / 'recipe.json').read_text()), source='test'); "
        "same_lessons(asked, course(asked), Ledger(folder / 'ledger.jsonl'))"
    )
    done = subprocess.run([sys.executable, "-c", again, str(tmp_path)], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_changed_answer_in_a_file_is_refused(tmp_path: Path) -> None:
    path, ledger = tmp_path / "own.jsonl", Ledger(tmp_path / "ledger.jsonl")
    asked = recipe(data=questions(path, 8))
    same_lessons(asked, course(asked), ledger)
    path.unlink()
    (tmp_path / "other").mkdir()
    changed = recipe(data={**questions(tmp_path / "other" / "own.jsonl", 9)})
    with pytest.raises(UsageError, match=r"not those that this run began with .* --name"):
        same_lessons(changed, course(changed), ledger)


@pytest.mark.parametrize("line", range(2))
def test_an_examination_on_changed_heldout_problems_is_refused_and_on_the_same_ones_not(line: int, tmp_path: Path) -> None:  # fmt: skip
    path, ledger = tmp_path / "own.jsonl", Ledger(tmp_path / "ledger.jsonl")
    asked = recipe(data=questions(path, 8))
    drawn = course(asked)
    same_lessons(asked, drawn, ledger)
    same_heldout(asked, heldout_only(asked).heldout, ledger)
    sides = (drawn.heldout, drawn.train)
    one = replace(sides[line][0], answer="0")
    other = replace(drawn, **{("heldout", "train")[line]: [one, *sides[line][1:]]})
    with pytest.raises(UsageError, match=("held-out", "training")[line]):
        same_lessons(asked, other, ledger)
    if line == 0:
        with pytest.raises(UsageError, match="held-out"):
            same_heldout(asked, other.heldout, ledger)
    else:
        same_heldout(asked, other.heldout, ledger)


def test_changed_conversations_are_refused(tmp_path: Path) -> None:
    talk, ledger = tmp_path / "talk.jsonl", Ledger(tmp_path / "ledger.jsonl")
    asked = recipe(sft={"data": str(talk)})
    talk.write_text('{"messages": []}\n')
    same_lessons(asked, course(asked), ledger)
    talk.write_text('{"messages": [{}]}\n')
    with pytest.raises(UsageError, match="has changed"):
        same_lessons(asked, course(asked), ledger)
