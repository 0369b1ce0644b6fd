"""Held-out problems never reach training, whatever the recipe."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.config.training import DataConfig, TaskConfig
from bascule.data import corpus
from bascule.data.tasks import registry
from bascule.errors import RecipeError


def config(
    *names: str, train: int = 64, heldout: int = 32, eval_seed: int = 5, **options: int
) -> DataConfig:
    tasks = tuple(TaskConfig(name=name, options=options) for name in names)
    return DataConfig(tasks=tasks, train_problems=train, eval_problems=heldout, eval_seed=eval_seed)


@given(
    names=st.lists(
        st.sampled_from(["chain_sum", "gcd", "letter_counting"]),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    seed=st.integers(0, 2**40),
    eval_seed=st.integers(0, 2**40),
    train=st.integers(16, 200),
    heldout=st.integers(3, 100),
)
@settings(max_examples=40, deadline=None)
def test_no_training_problem_is_held_out(names, seed, eval_seed, train, heldout):
    split = corpus.split(config(*names, train=train, heldout=heldout, eval_seed=eval_seed), seed)
    train_keys = {(problem.task, problem.key) for problem in split.train}
    heldout_keys = {(problem.task, problem.key) for problem in split.heldout}
    assert not train_keys & heldout_keys
    assert (len(train_keys), len(heldout_keys)) == (len(split.train), len(split.heldout))


@given(seed=st.integers(0, 2**40), eval_seed=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_a_family_small_enough_to_collide_is_still_split_cleanly(seed, eval_seed):
    split = corpus.split(
        config("chain_sum", train=400, heldout=60, eval_seed=eval_seed, min_terms=2, max_terms=2),
        seed,
    )
    assert not {problem.key for problem in split.train} & {problem.key for problem in split.heldout}
    assert len(split.train) + len(split.heldout) <= 200


def test_heldout_problems_depend_on_the_eval_seed_alone():
    one, two = corpus.split(config("gcd"), 1), corpus.split(config("gcd", train=100), 2)
    assert one.heldout == two.heldout == corpus.heldout_problems(config("gcd"))
    assert one.train != two.train
    assert corpus.heldout_problems(config("gcd", eval_seed=6)) != one.heldout


def test_countdown_is_split_by_the_numbers_not_their_order():
    split = corpus.split(config("countdown", train=150, heldout=50), 0)
    as_sets = [
        {
            (tuple(sorted(problem.metadata["numbers"])), problem.metadata["target"])
            for problem in side
        }
        for side in (split.train, split.heldout)
    ]
    assert not as_sets[0] & as_sets[1]


def test_a_shared_problem_is_refused_even_when_worded_differently():
    problem = registry.get("gcd").problems(0, 1, {})[0]
    with pytest.raises(AssertionError, match="held out"):
        corpus.Split(train=[problem], heldout=[problem])


def test_a_family_used_up_by_the_heldout_side_is_refused():
    with pytest.raises(RecipeError, match="all of them are held out"):
        corpus.split(config("chain_sum", heldout=400, min_terms=1, max_terms=1), 0)


def test_weights_share_the_problems_out():
    tasks = (TaskConfig(name="gcd", weight=3), TaskConfig(name="chain_sum", weight=1))
    split = corpus.split(DataConfig(tasks=tasks, train_problems=100, eval_problems=40), 0)
    assert sum(problem.task == "gcd" for problem in split.train) == 75
    assert sum(problem.task == "gcd" for problem in split.heldout) == 30
    assert {problem.task for problem in split.train[:20]} == {"gcd", "chain_sum"}


def test_problems_carry_the_name_their_recipe_uses():
    split = corpus.split(config("bascule.data.tasks.gcd:task", train=16, heldout=4), 0)
    assert all(
        registry.verify(problem, f"<think></think>{problem.answer}") == 1.0
        for problem in split.train
    )


def test_sft_examples_are_verified_traces_of_their_problems():
    split = corpus.split(config("countdown", train=120, heldout=10), 0)
    examples = corpus.sft_examples(split.train, 3)
    by_prompt = {f"<bos><user>{problem.question}<assistant>": problem for problem in split.train}
    assert 10 < len(examples) < len(split.train)
    assert all(
        registry.verify(by_prompt[prompt], completion) == 1.0 for prompt, completion in examples
    )
    assert examples == corpus.sft_examples(split.train, 3) != corpus.sft_examples(split.train, 4)


def test_the_mistakes_of_a_teacher_are_left_out_unless_they_are_asked_for():
    data = DataConfig(tasks=(TaskConfig(name="chain_sum", options={"lost_sign_ratio": 0.9}),), train_problems=64)  # fmt: skip
    problems = corpus.split(data, 0).train
    everything = corpus.sft_examples(problems, 0, verified=False)
    assert len(everything) == 64
    assert 16 < len(corpus.sft_examples(problems, 0)) < 48
