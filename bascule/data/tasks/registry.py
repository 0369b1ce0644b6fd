"""Tasks by name: the built-in ones, any of reasoning-gym's families as `gym:NAME`, a user's own as `package.module:object`, or a
file of questions as `jsonl:PATH`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from bascule.data.tasks import family, jsonl
from bascule.data.tasks.base import Problem, Task, VerifiesMany
from bascule.errors import RecipeError, nearest

BUILT_IN = ("chain_sum", "countdown", "gcd", "letter_counting")
"""Each is the module of that name beside this file; its object is called `task`."""


def get(name: str) -> Task:
    """The task of that name. Raises RecipeError when there is none, or when what is there is not a Task."""
    module_name, colon, attribute = name.partition(":")
    if module_name == jsonl.PREFIX and attribute:
        return jsonl.JsonLines(attribute)
    if module_name == family.PREFIX and attribute:
        return family.Family(attribute)
    if not colon:
        if name not in BUILT_IN:
            raise RecipeError(
                f"There is no task '{name}'; built in: {', '.join(BUILT_IN)}; reasoning-gym's families gym:NAME, your own "
                f"package.module:task, a file of questions jsonl:PATH."
                f"{nearest(name, BUILT_IN)}"
            )
        module_name, attribute = f"bascule.data.tasks.{name}", "task"
    elif str(Path.cwd()) not in sys.path:  # a task of the user's own may lie where bascule is run
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"Task '{name}': {error}. Install the package or run where it can be imported."
        ) from None
    except AttributeError:
        raise RecipeError(
            f"Task '{name}': module '{module_name}' has no object '{attribute}'."
        ) from None
    if not isinstance(found, Task):
        raise RecipeError(
            f"Task '{name}' is a {type(found).__name__} without name, problems, verify and trace (see bascule.data.tasks.base.Task)."
        )
    return found


def verify(problem: Problem, completion_text: str) -> float:
    """Reward of one completion, by the problem's own task."""
    return get(problem.task).verify(problem, completion_text)


def verify_many(problems: Sequence[Problem], completion_texts: Sequence[str]) -> list[float]:
    """Reward of each completion, by its problem's own task; a task that VerifiesMany gets all of its own in one call."""
    places_of: dict[str, list[int]] = {}
    for place, problem in enumerate(problems):
        places_of.setdefault(problem.task, []).append(place)
    rewards = [0.0] * len(problems)
    for name, places in places_of.items():
        mine = [problems[place] for place in places], [completion_texts[place] for place in places]
        for place, paid in zip(places, _of_one_task(get(name), *mine), strict=True):
            rewards[place] = float(paid)
    return rewards


def _of_one_task(task: Task, problems: list[Problem], texts: list[str]) -> Sequence[float]:
    if not isinstance(task, VerifiesMany):
        return [task.verify(one, text) for one, text in zip(problems, texts, strict=True)]
    paid = task.verify_many(problems, texts)
    if len(paid) != len(texts):
        raise RecipeError(
            f"Task '{task.name}': verify_many was given {len(texts)} completions and answered with {len(paid)} rewards. It must "
            "give one for each, in the same order; or leave verify_many out, and verify is asked one by one."
        )
    return paid
