"""From sampled token ids to rewards, through the verifier of each problem's own task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bascule.data.tasks import registry
from bascule.data.tasks.base import Problem
from bascule.data.tokenizer import Tokenizer


def verifier(
    problems: Sequence[Problem], tokenizer: Tokenizer
) -> Callable[[Sequence[int], Sequence[list[int]]], list[float]]:
    """A reward function for Grpo: (problem index, completion ids) of each sample to 0..1.

    A completion without its end token was cut off and earns nothing, whatever it says so far. Equal answers to one problem
    are verified once: late in training most of a group agrees.
    """

    def reward(owners: Sequence[int], completions: Sequence[list[int]]) -> list[float]:
        known: dict[tuple[int, tuple[int, ...]], float] = {}
        rewards = []
        for owner, tokens in zip(owners, completions, strict=True):
            at = owner, tuple(tokens)
            if at not in known:
                known[at] = _one(problems[owner], tokens, tokenizer)
            rewards.append(known[at])
        return rewards

    return reward


def _one(problem: Problem, tokens: list[int], tokenizer: Tokenizer) -> float:
    if not tokens or tokens[-1] != tokenizer.eos_id:
        return 0.0
    return registry.verify(problem, tokenizer.completion(tokens[:-1]))
