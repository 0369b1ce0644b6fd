"""`bascule evaluate`: a finished run's model on held-out problems, with exact verifiers."""

from __future__ import annotations

import time
from argparse import Namespace

from bascule.errors import CheckFailed
from bascule.infer.evaluate import evaluate
from bascule.ledger import Ledger
from bascule.records import Evaluation
from bascule.stages.answer import Answer, duration
from bascule.stages.course import heldout_only
from bascule.stages.finished import open_finished


def main(arguments: Namespace) -> Answer:
    """Exit 3 when `evaluate.min_pass_at_1` is set and not reached."""
    run = open_finished(arguments.run, arguments.on)
    changes = {"eval_seed": arguments.eval_seed, "eval_problems": arguments.problems}
    data = run.recipe.data.model_copy(
        update={name: value for name, value in changes.items() if value is not None}
    )
    course = heldout_only(run.recipe.model_copy(update={"data": data}), run.tokenizer)
    start = time.perf_counter()
    score = evaluate(
        run.engine, course.prompts(course.heldout), course.verifier(course.heldout), samples=run.recipe.evaluate.samples,
        max_tokens=run.recipe.grpo.max_completion_tokens, seed=run.recipe.seed,
    )  # fmt: skip
    record = Evaluation(
        after="evaluate", step=run.recipe.total_steps(), n=score.problems, samples=score.samples, pass_at_1=score.pass_at_1,
        pass_at_8=score.pass_at.get(8), greedy=score.greedy, truncated_ratio=score.truncated_ratio,
        seconds=time.perf_counter() - start, extra={"mean_completion_tokens": score.mean_tokens, "eval_seed": data.eval_seed}, pool=run.pool,
    )  # fmt: skip
    Ledger(run.folder.ledger).append(record)
    eight = f", pass@8 {record.pass_at_8:.1%}" if record.pass_at_8 is not None else ""
    text = f"pass@1 {record.pass_at_1:.1%} (T=1), greedy {record.greedy:.1%}{eight}; {record.n} held-out problems x {record.samples} samples, seed {data.eval_seed}, on {run.accelerator.name}, {duration(record.seconds)}"
    gate = run.recipe.evaluate.min_pass_at_1
    failed = gate is not None and record.pass_at_1 < gate
    if failed:
        text += f"\nThe gate evaluate.min_pass_at_1 = {gate} is not reached."
    return Answer(
        text=text,
        data=record.model_dump(exclude={"schema_version", "kind", "attempt"}),
        exit_code=CheckFailed.exit_code if failed else 0,
    )
