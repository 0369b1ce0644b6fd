"""Is everything there that a recipe names? Asked before a run begins: a task that cannot be imported, a missing file, package or fault profile would
otherwise end it only after its chips were examined, in a folder that the mended recipe may not go on in. No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bascule import draws
from bascule.accelerators.names import check_choices
from bascule.config.recipe import Recipe
from bascule.config.training import TaskConfig
from bascule.data import conversations, corpus
from bascule.data.tasks.base import Problem
from bascule.data.tokenizer import Tokenizer
from bascule.errors import RecipeError
from bascule.ledger import Ledger
from bascule.model import origin as model_origin
from bascule.plan.lengths import Lengths, assumed, counted
from bascule.stages import origin

LOOKED_AT = 16
"""Problems of each task that are drawn here. The trainer looks at all of them."""


def check(recipe: Recipe) -> None:
    """Raises RecipeError. `recipe` is resolved (origin.resolve)."""
    for pool in recipe.pools.values():
        check_choices(pool.accelerator)
    if recipe.model.from_:
        model_origin.refuse_torn(Path(recipe.model.from_))
    phases = recipe.phase_steps()
    positions = recipe.model.max_position_embeddings
    if "sft" in phases and recipe.sft.data:
        conversations.check(Path(recipe.sft.data), origin.tokenizer(recipe), positions)
    if "sft" in phases and recipe.sft.pack_tokens > positions:
        raise RecipeError(
            f"sft.pack_tokens = {recipe.sft.pack_tokens} exceeds model.max_position_embeddings = {positions}. Lower it, or raise the "
            "model's length."
        )
    if "grpo" in phases and recipe.grpo.router_replay and recipe.model.ffn != "moe":
        raise RecipeError(
            "grpo.router_replay = true, and the model has no experts to route to. Leave it out, or choose a model with them."
        )
    if {"sft", "grpo"} & set(phases):
        problems = [one for task in recipe.data.tasks for one in _some(task, recipe.data.eval_seed)]
        refuse_too_long(recipe, problems, origin.tokenizer(recipe))


def warn_of_threads(recipe: Recipe, ledger: Ledger) -> None:
    """A recipe of a larger machine runs here all the same, with the same bits: but its threads wait for each other."""
    cores = os.cpu_count() or 1
    if recipe.threads > cores:
        ledger.warn(
            "threads", f"threads = {recipe.threads} and this machine has {cores} cores: threads that share a core wait for each other, and a step "
            f"may take many times as long. threads = {cores} is the most that helps; it is part of the bits, so it cannot change within a run.",
        )  # fmt: skip


def _some(task: TaskConfig, seed: int) -> list[Problem]:
    """A few problems, among them perhaps held-out ones: nothing is learnt here."""
    found = corpus.drawn_from(task, draws.key(seed, "data.heldout"), LOOKED_AT)
    if not found:
        raise RecipeError(
            f"Task '{task.name}' has no problem with these options: {dict(task.options)}. Widen them in data.tasks."
        )
    return found


def refuse_too_long(recipe: Recipe, problems: Sequence[Problem], tokenizer: Tokenizer) -> None:
    """Can each of these problems and the longest completion allowed be read by the model? Raises RecipeError."""
    if "grpo" not in recipe.phase_steps() or not problems:
        return
    longest = max(len(tokenizer.encode(tokenizer.prompt(one.question))) for one in problems)
    asked = longest + recipe.grpo.max_completion_tokens
    allowed = recipe.model.max_position_embeddings
    if asked > allowed:
        raise RecipeError(
            f"grpo.max_completion_tokens={recipe.grpo.max_completion_tokens} and the longest problem's {longest} tokens make "
            f"{asked} positions; the model has {allowed}. Lower it, or raise model.max_position_embeddings."
        )


def lengths(recipe: Recipe) -> Lengths:
    """Of a few problems of each task, and of their worked solutions, in the recipe's own tokens; for the plan. Conversations are not
    looked at, their lengths are assumed."""
    if not {"sft", "grpo"} & set(recipe.phase_steps()):
        return assumed(recipe)
    tokenizer = origin.tokenizer(recipe)
    problems = [one for task in recipe.data.tasks for one in _some(task, recipe.data.eval_seed)]
    prompts = [len(tokenizer.encode(tokenizer.prompt(one.question))) for one in problems]
    own = "sft" in recipe.phase_steps() and not recipe.sft.data
    pairs = corpus.sft_examples(problems, 0, tokenizer.prompt, verified=False) if own else []
    worked = [len(tokenizer.encode(prompt)) + len(tokenizer.encode(text)) + 1 for prompt, text in pairs]  # fmt: skip
    return counted(recipe, prompts, worked)
