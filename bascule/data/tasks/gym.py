"""reasoning-gym behind bascule's tasks: its generators make the problems, its scorers judge the answers.

Its questions are long sentences that never change within a family; a character-level model would spend most of its prompt on
them, so each task asks the same problem in a short form of its own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from bascule import draws
from bascule.data import chat
from bascule.data.tasks import gym_apart, gym_datasets, scorer
from bascule.data.tasks.base import Options, Problem
from bascule.errors import RecipeError, nearest

Entry = dict[str, Any]

# A family can be smaller than what was asked for. Give up on finding new problems after this many draws per problem wanted.
_DRAWS_PER_PROBLEM = 3

_PLAIN = re.compile(r"0|-?[1-9][0-9]*")
"""A whole number in the one way that Python writes it."""

_SMALL_SEEDS = ("pool_matrix",)
"""Draws with numpy's old generator, which takes no seed from 2^32 on."""


_COMMON_DRAWS = ("list_functions",)
"""Draw some numbers from Python's or numpy's common generator, whatever their seed: an item would be another at every drawing."""


def distinct(
    name: str,
    seed: int,
    count: int,
    settings: Mapping[str, Any],
    convert: Callable[[Entry], Problem | None],
) -> list[Problem]:
    """Draw entries of dataset `name` until `count` problems with distinct keys are found or the family seems used up."""
    found: dict[str, Problem] = {}
    for entry in _entries(name, seed, _DRAWS_PER_PROBLEM * count + 64, count, settings):
        if len(found) >= count:
            break
        problem = convert(entry)
        if problem is not None:
            found.setdefault(problem.key, problem)
    return list(found.values())


def _entries(
    name: str, seed: int, size: int, first: int, settings: Mapping[str, Any]
) -> Iterator[Entry]:
    # reasoning-gym draws item i from Random(seed + i): neighbouring seeds would share almost all items, hence the hash.
    gym_seed = draws.key(seed, f"gym.{name}") >> (33 if name in _SMALL_SEEDS else 1)
    try:
        dataset = gym_datasets.create(name, seed=gym_seed, size=size, **settings)
    except AssertionError as error:
        raise RecipeError(
            f"Task '{name}' refuses the options {dict(settings)}: {error}. Change data.tasks.options."
        ) from None
    if name in gym_apart.FAMILIES:
        yield from gym_apart.entries(name, gym_seed, size, first, settings)
        return
    for index in range(size):
        yield seeded(dataset, index, gym_seed) if name in _COMMON_DRAWS else dataset[index]


def seeded(dataset: Sequence[Entry], index: int, seed: int) -> Entry:
    """An item whose draws from the common generator are a function of the seed too; the generator is put back as it was."""
    before, numpys = random.getstate(), np.random.get_state()
    random.seed(seed + index)
    np.random.seed((seed + index) % 2**32)
    try:
        return dataset[index]
    finally:
        random.setstate(before)
        np.random.set_state(numpys)


def verify(name: str, problem: Problem, completion_text: str) -> float:
    """Exact reward: one thought, then an answer that reasoning-gym gives its full score."""
    parsed = _parsed(problem, completion_text)
    return 1.0 if parsed is not None and scorer.right(name, parsed, problem) else 0.0


def verify_many(name: str, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """`verify` for a batch of a family whose answers are whole numbers. Two of them written plainly are the same number exactly when
    they are the same text; only what is written otherwise (`+01,000.00`) needs the scorer, which costs twenty times that."""
    rewards = []
    for problem, text in zip(problems, texts, strict=True):
        parsed = chat.parse_strict(text)
        if parsed and _PLAIN.fullmatch(parsed[1]) and _PLAIN.fullmatch(problem.answer):
            rewards.append(1.0 if parsed[1] == problem.answer else 0.0)
        else:
            rewards.append(verify(name, problem, text))
    return rewards


def _parsed(problem: Problem, text: str) -> str | None:
    """The answer, or None when the form is wrong. It must be ASCII where the right one is: scorers that call float() take other
    alphabets' digits for numbers. A `<` may stand in it where the right one has some (futoshiki)."""
    thought, closed, answer = text.partition(chat.THINK_CLOSE)
    if "<" in problem.answer and chat.parse_strict(f"{thought}{closed}x"):
        found = answer if answer and chat.THINK_OPEN not in answer and chat.THINK_CLOSE not in answer else None  # fmt: skip
    else:
        parsed = chat.parse_strict(text)
        found = parsed[1] if parsed else None
    return found if found and (found.isascii() or not problem.answer.isascii()) else None


def settings(
    name: str, options: Options, defaults: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[Entry, Entry]:
    """Split `options` into (reasoning-gym's settings, the task's own), defaults filled in.

    Raises RecipeError for a key that neither has, or a value whose type differs from the default's.
    """
    gym_fields = {field.name for field in fields(gym_datasets.kind(name)[1])} - {"seed", "size"}
    allowed = sorted(gym_fields | set(own))
    for key in options:
        if key not in allowed:
            raise RecipeError(
                f"Task '{name}' has no option '{key}'; allowed: {', '.join(allowed)}.{nearest(key, allowed)}"
            )
    merged = {**defaults, **own, **options}
    for key, default in {**defaults, **own}.items():
        if not isinstance(merged[key], _accepted(default)):
            raise RecipeError(
                f"Task '{name}': option {key}={merged[key]!r} must be {_accepted(default)[-1].__name__}."
            )
    return {key: merged[key] for key in merged if key not in own}, {key: merged[key] for key in own}


def _accepted(default: Any) -> tuple[type, ...]:
    return (int, float) if isinstance(default, float) else (type(default),)
