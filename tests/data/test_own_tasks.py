"""Tasks that users bring: a module of their own, and a file of questions in GSM8K's format."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bascule.config.training import DataConfig, TaskConfig
from bascule.data import corpus
from bascule.data.tasks import registry
from bascule.data.tasks.base import Problem
from bascule.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gsm") / "train.jsonl"
    lines = [
        {"question": f"Tom has {n} pens and buys {n}00 more. How many?", "answer": f"He buys {n}00.\nSo <<{n}+{n}00={n * 101}>>{n * 101}.\n#### {n * 101:,}"}
        for n in range(1, 41)
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return f"jsonl:{path}"


def test_a_file_of_questions_is_split_into_disjoint_sides(gsm8k: str) -> None:
    config = DataConfig(tasks=(TaskConfig(name=gsm8k),), train_problems=100, eval_problems=8)
    split = corpus.split(config, 0)
    assert len(split.heldout) == 8 and len(split.train) == 32
    assert corpus.heldout_problems(config) == corpus.split(config, 1).heldout


def test_the_worked_solution_is_the_thought_and_its_verifier_pays_it(gsm8k: str) -> None:
    problems = registry.get(gsm8k).problems(0, 40, {})
    examples = corpus.sft_examples(problems, 0)
    assert len(examples) == 40
    assert "<<" not in examples[0][1] and examples[0][1].startswith("<think>He buys")


@pytest.mark.parametrize(
    ("said", "reward"), [("1,010", 1.0), ("1010", 1.0), (" $1010.00 ", 1.0), ("1010.", 1.0), ("1011", 0.0), ("101", 0.0), ("1e3", 0.0)]
)  # fmt: skip
def test_numbers_are_compared_as_numbers(gsm8k: str, said: str, reward: float) -> None:
    task = registry.get(gsm8k)
    problem = next(p for p in task.problems(0, 40, {}) if p.answer == "1,010")
    assert task.verify(problem, f"<think></think>{said}") == reward
    assert task.verify(problem, said) == 0.0


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        registry.get(f"jsonl:{tmp_path}/none").problems(0, 1, {})
    (tmp_path / "a.jsonl").write_text('{"q": "1+1", "a": "2"}\n')
    task = registry.get(f"jsonl:{tmp_path}/a.jsonl")
    with pytest.raises(RecipeError, match="line 1"):
        task.problems(0, 1, {})
    assert task.problems(0, 1, {"question": "q", "answer": "a"})[0].answer == "2"
    with pytest.raises(RecipeError, match="no option 'split'"):
        task.problems(0, 1, {"split": "test"})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question": "1+1", "answer": None}, "'answer' is null, neither text nor a number"),
        ({"question": "1+1", "answer": ["2"]}, "neither text nor a number"),
        ({"question": "1+1", "answer": True}, "neither text nor a number"),
        ({"question": "1+1", "answer": "so it is ####"}, "'answer' is empty"),
        ({"question": " ", "answer": "2"}, "'question' is empty"),
        ({"question": "\ud800", "answer": "2"}, "'question' holds half of a surrogate pair"),
    ],
)
def test_a_line_that_nobody_can_ask_or_answer_is_named(
    tmp_path: Path, line: dict[str, object], says: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "2-5", "answer": "\u22123"}) + "\n" + json.dumps(line))
    with pytest.raises(RecipeError, match=f"line 2 .*{says}"):
        registry.get(f"jsonl:{path}").problems(0, 9, {})


def test_every_minus_is_one(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"question": "2-5", "answer": "\u22123"}))
    task = registry.get(f"jsonl:{path}")
    [problem] = task.problems(0, 1, {})
    assert task.verify(problem, "<think>less</think>-3") == 1.0


def test_the_example_is_a_task_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    task = registry.get("examples.own_task:task")
    problems = task.problems(3, 50, {})
    assert problems == task.problems(3, 50, {}) and len({p.key for p in problems}) == 50
    assert all(task.verify(p, task.trace(p, 0)) == 1.0 for p in problems)
    assert len((ROOT / "examples" / "own_task.py").read_text().splitlines()) <= 40


BATCHED = """
import numpy as np
from examples.own_task import Largest

class Batched(Largest):
    name = "batched"
    calls = 0

    def verify_many(self, problems, completion_texts):
        Batched.calls += 1
        said = np.char.rpartition(np.array(completion_texts), "</think>")[:, 2]
        return (said == np.array([one.answer for one in problems])).astype(float)

class Forgetful(Batched):
    def verify_many(self, problems, completion_texts):
        return super().verify_many(problems, completion_texts)[1:]

task, forgetful = Batched(), Forgetful()
"""


def test_a_task_that_verifies_many_is_asked_once_a_batch_and_must_answer_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_batched_task.py").write_text(BATCHED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)

    def problems_of(name: str) -> list[Problem]:
        made = registry.get(name).problems(0, 6, {})
        return [dataclasses.replace(one, task=name) for one in made]

    mixed = problems_of("my_batched_task:task") + problems_of("examples.own_task:task")
    texts = [f"<think></think>{one.answer if i % 3 else 'no'}" for i, one in enumerate(mixed)]
    assert registry.verify_many(mixed, texts) == [float(i % 3 > 0) for i in range(len(mixed))]
    assert registry.get("my_batched_task:task").calls == 1
    with pytest.raises(RecipeError, match="given 6 completions and answered with 5"):
        registry.verify_many(problems_of("my_batched_task:forgetful"), texts[:6])


@pytest.mark.slow
def test_a_run_trains_on_both(gsm8k: str, tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(f"""
pools.here.accelerator = "cpu"
model = {{ preset = "tick", max_position_embeddings = 160 }}
train = {{ phases = ["sft", "grpo"], snapshot_every_steps = 4 }}
sft = {{ steps = 2, batch_sequences = 4 }}
grpo = {{ steps = 2, prompts = 2, group_size = 2, max_completion_tokens = 8, min_start_pass_at_16 = 0.0 }}
qualify = {{ required = false, time_limit_s = 0.1 }}
evaluate.samples = 1
[data]
train_problems = 40
eval_problems = 4
[[data.tasks]]
name = "examples.own_task:task"
[[data.tasks]]
name = "{gsm8k}"
""")
    bascule = Path(sys.executable).parent / "bascule"
    for command in (
        ["run", str(recipe), "--out", str(tmp_path)],
        ["evaluate", str(tmp_path / "own")],
    ):
        done = subprocess.run(
            [str(bascule), *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_free_form_mathematics_is_judged_by_math_verify(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    path = tmp_path / "maths.jsonl"
    path.write_text('{"question": "Half of one?", "answer": "\\\\frac{1}{2}"}\n')
    [problem] = registry.get(f"jsonl:{path}").problems(0, 1, {"verify": "math"})
    [plain] = registry.get(f"jsonl:{path}").problems(0, 1, {})
    for said, right in (("0.5", 1.0), ("1/2", 1.0), ("2/4", 1.0), ("0.6", 0.0)):
        assert registry.verify(problem, f"<think>so</think>{said}") == right
    assert registry.verify(plain, "<think>so</think>0.5") == 0.0


def test_an_unknown_rule_of_verification_is_refused(gsm8k: str) -> None:
    with pytest.raises(RecipeError, match="allowed: plain, math"):
        registry.get(gsm8k).problems(0, 1, {"verify": "maths"})
