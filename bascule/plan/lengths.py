"""How long are the texts that a recipe trains on? Memory and time follow from tokens, not from how many the model could read. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bascule.config.recipe import Recipe

TYPICAL_SHARE = (
    0.4  # of max_position_embeddings: the demo's mean sequence, where nothing could be looked at
)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt, and of a prompt with its worked solution: mean and longest of those looked at. `basis` in words."""

    prompt: float
    prompt_longest: int
    worked: float
    worked_longest: int
    basis: str


def assumed(recipe: Recipe) -> Lengths:
    """No sequence is longer than the model reads; `worked` is a share of that."""
    longest = recipe.model.max_position_embeddings
    prompt = max(1, longest - recipe.grpo.max_completion_tokens)
    return Lengths(
        TYPICAL_SHARE * prompt, prompt, TYPICAL_SHARE * longest, longest,
        "lengths assumed: as long as the model reads, and 0.4 of it at the mean",
    )  # fmt: skip


def counted(recipe: Recipe, prompts: Sequence[int], worked: Sequence[int]) -> Lengths:
    """From tokens of prompts, and of those with their solutions (none where the tasks work nothing out)."""
    guess = assumed(recipe)
    if not prompts:
        return guess
    return Lengths(
        statistics.mean(prompts),
        max(prompts),
        statistics.mean(worked) if worked else guess.worked,
        max(worked) if worked else guess.worked_longest,
        f"lengths of {len(prompts)} of the recipe's own problems",
    )
