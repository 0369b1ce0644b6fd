"""What a training worker measures between phases, and what it refuses to begin."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from bascule.config.recipe import Recipe
from bascule.config.training import PretrainConfig
from bascule.errors import CheckFailed
from bascule.infer.evaluate import Score, evaluate
from bascule.ledger import Ledger
from bascule.records import Evaluation, Migration, TextEvaluation
from bascule.stages.course import Course
from bascule.stages.phases import reading
from bascule.stages.rollouts import Rollouts
from bascule.train import pretrain
from bascule.train.step import Stepper


class Measure:
    """`beat(step)` says that the trainer lives."""

    def __init__(
        self,
        recipe: Recipe,
        course: Course,
        stepper: Stepper,
        rollouts: Rollouts,
        ledger: Ledger,
        beat: Callable[[int], None],
    ) -> None:
        self.recipe, self.course, self.stepper = recipe, course, stepper
        self.rollouts, self.ledger, self.beat = rollouts, ledger, beat

    def if_due(self, after: str, step: int) -> None:
        """Measure the model of `step`, unless the ledger holds it already."""
        if after == "pretrain":
            return self._text(step)
        if self._measured(Evaluation, after, step):
            return
        self.beat(step)
        start = time.perf_counter()
        score = evaluate(
            self.rollouts, self.course.prompts(self.course.heldout), self.course.verifier(self.course.heldout),
            samples=self.recipe.evaluate.samples, max_tokens=self.recipe.grpo.max_completion_tokens, seed=self.recipe.seed,
            answer=self.course.answer,
        )  # fmt: skip
        self.ledger.append(
            Evaluation(
                after=after, step=step, n=score.problems, samples=score.samples, pass_at_1=score.pass_at_1,
                pass_at_8=score.pass_at.get(8), greedy=score.greedy, truncated_ratio=score.truncated_ratio,
                seconds=time.perf_counter() - start, extra={"mean_completion_tokens": score.mean_tokens, **spread(score)}, pool=self.rollouts.pool,
            )
        )  # fmt: skip

    def refuse_hopeless_grpo(self) -> None:
        """Reinforcement needs some right answers to reinforce (training.md 2.7): stop before hours are spent on nothing."""
        floor = self.recipe.grpo.min_start_pass_at_16
        if floor <= 0:
            return
        problems = self.course.train[:64]
        score = evaluate(
            self.rollouts, self.course.prompts(problems), self.course.verifier(problems), samples=16, ks=(1, 16), greedy=False,
            max_tokens=self.recipe.grpo.max_completion_tokens, seed=self.recipe.seed,
        )  # fmt: skip
        if score.pass_at[16] < floor:
            raise CheckFailed(
                f"GRPO was not started: the start model solves {score.pass_at[16]:.1%} of {score.problems} training problems in 16 tries "
                f"(pass@1 {score.pass_at_1:.1%}); grpo.min_start_pass_at_16 asks for {floor:.0%}. Train SFT longer, make the problems "
                "easier, or lower the bound if you know better."
            )

    def _text(self, step: int) -> None:
        """Bits per byte on the held-out shards, on the training chip: the engine samples and does not score."""
        if self._measured(TextEvaluation, "pretrain", step):
            return
        self.beat(step)
        start = time.perf_counter()

        def score(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
            self.beat(step)
            return self.stepper.score(tensors, max(1, step))

        found = text_evaluation(
            self.recipe.pretrain, score, after="pretrain", step=step, start=start
        )
        self.ledger.append(found)

    def _measured(
        self, kind: type[Evaluation] | type[TextEvaluation], after: str, step: int
    ) -> bool:
        """Was the model of `step` evaluated? What was measured before a rollback behind it was another model's."""
        found = False
        for record in self.ledger.read():
            if isinstance(record, kind) and record.step == step:
                found |= record.after == after if isinstance(record, Evaluation) else True
            elif isinstance(record, Migration) and record.resumed_from_step < step:
                found = False
        return found


def text_evaluation(
    config: PretrainConfig,
    score: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    *,
    after: str,
    step: int,
    start: float,
) -> TextEvaluation:
    """Bits per byte of the recipe's held-out shards under `score`, which gives the log-probability of every target (Stepper.score).
    `start` is when it began, by time.perf_counter."""
    found = pretrain.measure(
        score,
        reading(config, "heldout"),
        rows=config.batch_sequences,
        windows=config.eval_sequences,
    )
    return TextEvaluation(
        after=after, step=step, bits_per_byte=found["bits_per_byte"], nats_per_token=found["nats_per_token"],
        tokens=int(found["tokens"]), text_bytes=int(found["text_bytes"]), seconds=time.perf_counter() - start,
    )  # fmt: skip


def spread(score: Score) -> dict[str, float]:
    """Of an evaluation: the majority vote, and the 95 % interval of pass@1."""
    low, high = score.interval(score.pass_at_1)
    vote = {} if score.majority is None else {f"maj_at_{score.samples}": score.majority}
    return {**vote, "pass_at_1_low": low, "pass_at_1_high": high}
