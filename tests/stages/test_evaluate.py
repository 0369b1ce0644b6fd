"""What `bascule evaluate` may call held out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bascule.config.load import recipe_from
from bascule.data import corpus
from bascule.errors import UsageError
from bascule.folder import RunFolder
from bascule.stages import evaluate

TASK = {"name": "chain_sum", "options": {"min_terms": 2, "max_terms": 2}}


def small_family(train_problems: int) -> Any:
    """200 sums, 16 of them held out, and a run that learns from most of the rest."""
    data = {"tasks": [TASK], "train_problems": train_problems, "eval_problems": 16}
    raw = {"name": "t", "pools": {"here": {"accelerator": "cpu"}}, "data": data}
    folder = RunFolder(Path("no such run"))  # and so no ledger: of before lessons were noted
    return SimpleNamespace(recipe=recipe_from(raw, source="test"), folder=folder)


@pytest.mark.parametrize("changes", [{"eval_problems": 100}, {"eval_seed": 5}])
def test_problems_that_the_run_learnt_from_are_not_called_held_out(changes: dict[str, int]) -> None:
    run = small_family(150)
    data = run.recipe.data.model_copy(update=changes)
    drawn = corpus.heldout_problems(data)
    kept = evaluate._heldout(run, data, drawn)
    learnt = {problem.key for problem in corpus.split(run.recipe.data, run.recipe.seed).train}
    assert kept == [problem for problem in drawn if problem.key not in learnt]
    assert 0 < len(kept) < len(drawn)
    assert evaluate._said(len(drawn) - len(kept), len(drawn)).startswith(f" ({len(drawn) - len(kept)} of the {len(drawn)} drawn")  # fmt: skip


def test_the_recipes_own_held_out_problems_are_all_asked() -> None:
    run = small_family(150)
    drawn = corpus.heldout_problems(run.recipe.data)
    assert evaluate._heldout(run, run.recipe.data, drawn) == drawn
    fewer = run.recipe.data.model_copy(update={"eval_problems": 4})
    assert len(evaluate._heldout(run, fewer, corpus.heldout_problems(fewer))) == 4


def test_problems_that_were_all_learnt_measure_nothing() -> None:
    run = small_family(150)
    learnt = corpus.split(run.recipe.data, run.recipe.seed).train
    data = run.recipe.data.model_copy(update={"eval_seed": 5})
    with pytest.raises(UsageError, match="were trained on, so they measure nothing"):
        evaluate._heldout(run, data, learnt[:8])
