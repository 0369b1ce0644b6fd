"""Every family: reasoning-gym's problems, an exact verifier, and a solver that is right or silent."""

import functools
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.data import chat
from bascule.data.tasks import countdown, registry, scorer
from bascule.data.tasks.base import Problem, Task
from bascule.data.tokenizer import Tokenizer
from bascule.errors import RecipeError

FAMILIES = [pytest.param(name, id=name) for name in registry.BUILT_IN]


def some(name: str, count: int = 60, **options: object) -> list[Problem]:
    return registry.get(name).problems(7, count, options)


@functools.cache
def eight(name: str) -> list[Problem]:
    return some(name, 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_problems_are_a_pure_function_of_the_seed_with_distinct_keys(name):
    first, again, other = some(name), some(name), registry.get(name).problems(8, 60, {})
    assert first == again
    assert len({problem.key for problem in first}) == len(first) == 60
    assert [problem.key for problem in other] != [problem.key for problem in first]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_is_paid_in_full_and_can_be_encoded(name):
    task, tokenizer = registry.get(name), Tokenizer()
    traces = [(problem, task.trace(problem, key)) for problem in some(name) for key in range(3)]
    solved = [(problem, trace) for problem, trace in traces if trace is not None]
    assert len(solved) > 20
    for problem, trace in solved:
        assert task.verify(problem, trace) == 1.0
        assert tokenizer.decode(tokenizer.encode(chat.prompt(problem.question) + trace)).endswith(
            trace
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_answer_or_a_broken_format_is_paid_nothing(name):
    task, problem = registry.get(name), some(name, 1)[0]
    good = chat.completion("", problem.answer.replace(" ", ""))
    assert task.verify(problem, good) == 1.0
    broken = [
        problem.answer,
        good + "<user>",
        good.replace("</think>", ""),
        chat.completion("", "-98765"),
        good + "1",
        "",
    ]
    assert [task.verify(problem, text) for text in broken] == [0.0] * len(broken)


ODD = [
    "+7",
    "007",
    "7.0",
    "7e0",
    "1,000",
    "-0",
    "0",
    " 7",
    "7 ",
    "\u0667",
    "nan",
    "no",
    "7\x00",
    "",
]


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_batch_is_paid_as_its_completions_one_by_one(data):
    problems, texts = [], []
    for name in data.draw(st.lists(st.sampled_from(registry.BUILT_IN), min_size=1, max_size=12)):
        problem = data.draw(st.sampled_from(eight(name)))
        said = data.draw(st.sampled_from([problem.answer, f"+{problem.answer}", f"0{problem.answer}", *ODD]) | st.text(max_size=4))  # fmt: skip
        form = data.draw(st.sampled_from(["<think>{}</think>", "<think></think>", "", "<think>"]))
        problems.append(problem)
        texts.append(form + said)
    one_by_one = [registry.verify(p, text) for p, text in zip(problems, texts, strict=True)]
    assert registry.verify_many(problems, texts) == one_by_one


def test_a_batch_of_plain_numbers_never_asks_the_scorer(monkeypatch):
    problems = eight("chain_sum")
    texts = [chat.completion("so", p.answer if i % 2 else "4321") for i, p in enumerate(problems)]
    monkeypatch.setattr(scorer, "right", None)
    assert registry.verify_many(problems, texts) == [float(i % 2) for i in range(len(problems))]


@pytest.mark.parametrize("name", FAMILIES)
def test_direct_answers_come_in_the_share_asked_for_and_are_right(name):
    task = registry.get(name)
    problems = some(name, direct_ratio=0.5) * 4
    traces = [task.trace(problem, key) for key, problem in enumerate(problems)]
    found = [trace for trace in traces if trace is not None]
    direct = sum(trace.startswith("<think></think>") for trace in found) / len(found)
    assert 0.35 < direct < 0.65


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_option_is_refused_with_the_allowed_names(name):
    with pytest.raises(RecipeError, match="direct_ratio"):
        some(name, direct_ration=0.5)


def test_an_option_of_the_wrong_type_or_an_impossible_one_is_refused():
    with pytest.raises(RecipeError, match="must be int"):
        some("chain_sum", min_terms="three")
    with pytest.raises(RecipeError, match="max_terms must be"):
        some("chain_sum", min_terms=9)
    with pytest.raises(RecipeError, match="operators"):
        some("countdown", operators="^")


def test_chain_sum_writes_every_partial_sum():
    problem = next(problem for problem in some("chain_sum") if problem.difficulty == 4)
    trace = registry.get("chain_sum").trace(problem, 0)
    assert trace is not None
    thought, answer = chat.split_reasoning(trace)
    assert thought.count("=") == 3
    assert thought.endswith(f"={answer}")


def test_a_teacher_with_a_bad_habit_loses_minus_signs_in_the_share_asked_for_and_goes_on_from_there():
    task = registry.get("chain_sum")
    negative, lost = 0, 0
    for key, problem in enumerate(some("chain_sum", lost_sign_ratio=0.5) * 4):
        trace = task.trace(problem, key)
        thought, answer = chat.parse_strict(trace)
        wrong = 0
        for question, _, result in (step.partition("=") for step in thought.split(",")):
            negative += eval(question) < 0
            wrong += eval(question) != int(result)
            assert abs(eval(question)) == abs(int(result))
        lost += wrong
        assert answer == thought.rpartition("=")[2]
        assert wrong or task.verify(problem, trace) == 1.0
    assert 0.35 < lost / negative < 0.65
    assert task.trace(problem, 7) == task.trace(problem, 7)


def test_countdown_traces_show_failed_tries_before_the_one_that_works():
    task = registry.get("countdown")
    traces = [trace for problem in some("countdown", 100) if (trace := task.trace(problem, 1))]
    tries = [trace.count("x") + 1 for trace in traces]
    assert max(tries) > 1
    assert max(tries) <= 4
    assert all(trace.count("ok</think>") == 1 for trace in traces)


def test_countdown_searches_differ_by_key():
    task = registry.get("countdown")
    assert (
        len({task.trace(problem, key) for problem in some("countdown", 5) for key in range(20)})
        > 10
    )


@pytest.mark.parametrize(
    "answer",
    [
        "7*3+4",
        "25",
        "(7*3)+5-1",
        "7*3+5+0",
        "9**9**9**9",
        "__import__('os').getcwd()",
        "7*3+5)",
        "26",
        "7*3+5*",
        "7//1",
    ],
)
def test_countdown_refuses_what_does_not_use_the_numbers_to_reach_the_target(answer):
    problem = Problem(
        task="countdown", question="3,5,7:26", answer="7*3 + 5", key="3,5,7:26", difficulty=3,
        metadata={"numbers": [3, 5, 7], "target": 26},
    )  # fmt: skip
    task = countdown.task
    assert task.verify(problem, chat.completion("", "(7*3)+5")) == 1.0
    start = time.perf_counter()
    assert task.verify(problem, chat.completion("", answer)) == 0.0
    assert time.perf_counter() - start < 0.5


def test_countdown_division_is_exact():
    problems = some("countdown", 40, operators="+-*/", max_tries=8)
    traces = [
        trace
        for problem in problems
        for key in range(4)
        if (trace := countdown.task.trace(problem, key))
    ]
    assert any("/" in chat.split_reasoning(trace)[1] for trace in traces)


def test_256_chain_sums_are_verified_in_under_20_ms():
    task, problems = registry.get("chain_sum"), some("chain_sum", 256)
    texts = [str(task.trace(problem, 0)) for problem in problems]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        assert all(
            task.verify(problem, text) == 1.0 for problem, text in zip(problems, texts, strict=True)
        )
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.02


def test_a_task_of_the_users_own_is_found_by_entry_point():
    assert registry.get("bascule.data.tasks.gcd:task") is registry.get("gcd")
    assert isinstance(registry.get("gcd"), Task)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("chainsum", "Did you mean 'chain_sum'"),
        ("no_such_package:task", "no_such_package"),
        ("json:nothing", "no object"),
        ("json:dumps", "without name"),
    ],
)
def test_a_task_that_is_not_there_is_refused_with_what_to_do(name, says):
    with pytest.raises(RecipeError, match=says):
        registry.get(name)


@pytest.mark.slow
def test_problems_do_not_depend_on_the_process():
    program = (
        "from bascule.data.tasks import registry\n"
        "for name in registry.BUILT_IN:\n"
        "    task = registry.get(name)\n"
        "    print([(p.question, p.answer, task.trace(p, 3)) for p in task.problems(5, 40, {})])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("<think>") > 60
