"""A recipe's phases as objectives, in order, each with the steps it owns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from bascule.config.recipe import Recipe
from bascule.config.training import PretrainConfig
from bascule.data import conversations
from bascule.data.shards import Shards
from bascule.data.tasks.base import Problem
from bascule.ledger import Ledger
from bascule.stages.course import Course
from bascule.stages.rollouts import Rollouts
from bascule.train import pretrain, rewards
from bascule.train.extra import Extended
from bascule.train.grpo import Grpo
from bascule.train.objective import Objective
from bascule.train.sft import Sft
from bascule.train.step import Stepper


def objectives(
    recipe: Recipe, course: Course, stepper: Stepper, rollouts: Rollouts, ledger: Ledger
) -> dict[str, Objective]:
    found: dict[str, Objective] = {}
    first = 1
    for phase, steps in recipe.phase_steps().items():
        if phase == "pretrain":
            objective: Objective = pretrain.Pretrain(
                recipe.pretrain,
                reading(recipe.pretrain, "train"),
                seed=recipe.seed,
                first_step=first,
            )
        elif phase == "sft":
            objective = _sft(recipe, course, ledger, first)
        else:
            objective = _grpo(recipe, course, stepper, rollouts, first)
        found[phase] = _extended(recipe, course, objective)
        first += steps
    return found


def reading(config: PretrainConfig, split: str) -> pretrain.Reading:
    shards = Shards.open(Path(str(config.data)))
    return pretrain.Reading(
        shards.text(split), config.sequence_length, shards.token_bytes(), config.document_mask
    )


def _sft(recipe: Recipe, course: Course, ledger: Ledger, first_step: int) -> Sft:
    longest = course.model.max_position_embeddings
    if recipe.sft.data:
        examples, left_out = conversations.examples(
            Path(recipe.sft.data), course.tokenizer, longest
        )
        dropped = left_out.total()
        what = f"SFT leaves out of '{recipe.sft.data}': {'; '.join(f'{why}, {count}' for why, count in left_out.items())}"
    else:
        examples = course.examples(recipe.seed)
        shown = len(course.train[: course.worked])
        dropped = shown - len(examples)
        what = f"{dropped} of {shown} training problems have no worked solution that succeeds; SFT leaves them out"
    if dropped and not any(
        record.kind == "warning" and record.what == "examples dropped" for record in ledger.read()
    ):
        ledger.warn("examples dropped", what)
    return Sft(
        recipe.sft,
        examples,
        seed=recipe.seed,
        pad_id=course.tokenizer.pad_id,
        first_step=first_step,
    )


def _grpo(
    recipe: Recipe, course: Course, stepper: Stepper, rollouts: Rollouts, first_step: int
) -> Grpo:
    return Grpo(
        recipe.grpo, course.prompts(course.train), seed=recipe.seed, pad_id=course.tokenizer.pad_id,
        sampler=rollouts.sample, ahead=rollouts.ahead, score=stepper.score, reward=rewards.verifier(course.train, course.tokenizer),
        first_step=first_step, difficulties=difficulties(course.train),
    )  # fmt: skip


def difficulties(problems: Sequence[Problem]) -> list[float]:
    """Of each problem, the share of its own task's problems that are easier: tasks count difficulty in units of their own."""
    of_task: dict[str, list[int]] = {}
    for problem in problems:
        of_task.setdefault(problem.task, []).append(problem.difficulty)
    ranked = {task: sorted(found) for task, found in of_task.items()}
    return [
        bisect_left(ranked[one.task], one.difficulty) / len(ranked[one.task]) for one in problems
    ]


def _extended(recipe: Recipe, course: Course, objective: Objective) -> Objective:
    """With the extra loss terms of the phases that learn from given text; GRPO's loss stays as published."""
    model, config = course.model, recipe.train
    ahead = bool(model.num_nextn_predict_layers) and config.mtp_loss_weight > 0
    balance = model.ffn == "moe" and config.balance_loss_weight > 0
    if objective.phase == "grpo" or not (ahead or balance):
        return objective
    return Extended(objective, config, ahead, balance)
