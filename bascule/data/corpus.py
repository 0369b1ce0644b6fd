"""Which problems are for training and which are held out, and the worked examples for SFT.

The held-out problems are drawn first, with their own seed, and depend on nothing else: two runs with different seeds are
measured on the same ones. Training problems whose (task, key) is held out are removed, and the result is checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from bascule import draws
from bascule.config.training import DataConfig, TaskConfig
from bascule.data import chat
from bascule.data.tasks import registry
from bascule.data.tasks.base import Problem
from bascule.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Split:
    """No problem of `train` is in `heldout`, by (task, key). Both are in a fixed, shuffled order."""

    train: list[Problem]
    heldout: list[Problem]

    def __post_init__(self) -> None:
        heldout = {_identity(problem) for problem in self.heldout}
        shared = [problem.key for problem in self.train if _identity(problem) in heldout]
        if shared:
            raise AssertionError(
                f"{len(shared)} training problems are held out, the first: {shared[0]!r}"
            )


def split(config: DataConfig, seed: int) -> Split:
    """Draw both sides: held-out from `config.eval_seed` alone, training from `seed`.

    May give fewer problems than asked for when a family is small; never fewer than one per side and task (RecipeError).
    """
    heldout = heldout_problems(config)
    taken = {_identity(problem) for problem in heldout}
    train: list[Problem] = []
    for task, count in _shares(config.tasks, config.train_problems):
        # Held-out problems turn up here too and are dropped: draw as many more as there are, so that `count` are left.
        drawn = drawn_from(task, draws.key(seed, "data.train"), count + len(heldout))
        kept = [problem for problem in drawn if _identity(problem) not in taken][:count]
        if not kept:
            raise RecipeError(
                f"Task '{task.name}' has only {len(drawn)} distinct problems with these options and all of them are held out; "
                f"lower data.eval_problems={config.eval_problems} or widen data.tasks.options."
            )
        train += kept
    return Split(train=_shuffled(train, draws.key(seed, "data.order")), heldout=heldout)


def heldout_problems(config: DataConfig) -> list[Problem]:
    """The held-out side alone: what evaluation needs."""
    heldout: list[Problem] = []
    for task, count in _shares(config.tasks, config.eval_problems):
        heldout += drawn_from(task, draws.key(config.eval_seed, "data.heldout"), count)
    if not heldout:
        raise RecipeError(
            "No held-out problem could be drawn; raise data.eval_problems or widen data.tasks.options."
        )
    return _shuffled(heldout, draws.key(config.eval_seed, "data.order"))


def never_trained_on(problems: list[Problem], config: DataConfig, seed: int) -> list[Problem]:
    """Those of `problems` that a run of this recipe has not learnt from. Only its own held-out problems are sure to be such; of a
    small family, others drawn with another seed or in greater number are mostly training problems."""
    learnt = {_identity(problem) for problem in split(config, seed).train}
    return [problem for problem in problems if _identity(problem) not in learnt]


def sft_examples(
    problems: list[Problem],
    seed: int,
    prompt: Callable[[str], str] = chat.prompt,
    *,
    verified: bool = True,
) -> list[tuple[str, str]]:
    """(prompt text, completion text) of every problem whose solver succeeded with this seed; the others are left out.

    `prompt` writes the question as the model reads it (Tokenizer.prompt). The end token is not part of the completion text: training
    appends it. Another seed gives other searches for the same problems. A trace that its own verifier does not pay in full is a defect of
    the solver and is dropped too, unless `verified` is False.
    """
    tasks = {name: registry.get(name) for name in {problem.task for problem in problems}}
    found = [
        (problem, trace)
        for index, problem in enumerate(problems)
        if (trace := tasks[problem.task].trace(problem, draws.key(seed, "data.trace", index)))
        is not None
    ]
    asked, traces = [problem for problem, _ in found], [trace for _, trace in found]
    paid = registry.verify_many(asked, traces) if verified else [1.0] * len(found)
    return [
        (prompt(problem.question), trace)
        for (problem, trace), reward in zip(found, paid, strict=True)
        if reward == 1.0
    ]


def drawn_from(task: TaskConfig, seed: int, count: int) -> list[Problem]:
    """Problems that carry the name the recipe uses, so that the registry finds their task again."""
    found = registry.get(task.name).problems(seed, count, task.options)
    return [dataclasses.replace(problem, task=task.name) for problem in found]


def _shares(tasks: tuple[TaskConfig, ...], count: int) -> list[tuple[TaskConfig, int]]:
    """Share `count` out by weight; rounding never leaves a task empty-handed nor loses one."""
    total = sum(task.weight for task in tasks)
    shares, before = [], 0.0
    for task in tasks:
        after = before + count * task.weight / total
        shares.append((task, max(1, round(after) - round(before))))
        before = after
    return shares


def _shuffled(problems: list[Problem], key: int) -> list[Problem]:
    return [problems[i] for i in draws.permutation(key, len(problems))]


def _identity(problem: Problem) -> tuple[str, str]:
    return problem.task, problem.key
