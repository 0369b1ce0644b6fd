"""`bascule evaluate`: a finished run's model on held-out problems, with exact verifiers, and on the held-out text it was pretrained beside."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from bascule.config.training import DataConfig
from bascule.data import corpus
from bascule.data.shards import Shards
from bascule.data.tasks.base import Problem
from bascule.errors import CheckFailed, UsageError
from bascule.infer.evaluate import evaluate
from bascule.infer.samples import SampleStore
from bascule.ledger import Ledger, last
from bascule.records import Evaluation, RunFinished, TextOpened
from bascule.stages.answer import Answer, duration
from bascule.stages.course import heldout_only, same_heldout
from bascule.stages.finished import Finished, open_finished
from bascule.stages.measure import spread, text_evaluation
from bascule.train.precision import precision_of
from bascule.train.step import Stepper


def main(arguments: Namespace) -> Answer:
    """Exit 3 when `evaluate.min_pass_at_1` is set and not reached."""
    run = open_finished(arguments.run, arguments.on)
    phases = run.recipe.train.phases
    asked = {"--samples": arguments.samples, "--problems": arguments.problems, "--eval-seed": arguments.eval_seed}  # fmt: skip
    unheard = [name for name, value in asked.items() if value is not None]
    if unheard and not {"sft", "grpo"} & set(phases):
        raise UsageError(
            f"{', '.join(unheard)} is about problems, and this run learnt from text alone (train.phases = {list(phases)}); it is measured in bits "
            "per byte of its held-out text. Leave the option out."
        )
    text = _text(run) if "pretrain" in phases else None
    tasks = _tasks(run, arguments) if {"sft", "grpo"} & set(phases) else None
    if text is None or tasks is None:
        found = tasks or text
        assert found is not None
        return found
    return replace(tasks, text=f"{text.text}\n{tasks.text}", data={**tasks.data, "text": text.data})


def _text(run: Finished) -> Answer:
    """Raises UsageError when the shards are gone or are not those that the run began with."""
    config, ledger = run.recipe.pretrain, Ledger(run.folder.ledger, pool=run.pool)
    began = last(ledger.read(), TextOpened)
    if began and Shards.open(Path(str(config.data))).digest() != began.sha256:
        raise UsageError(
            f"'{config.data}' is not the text this run was pretrained on (index SHA-256 {began.sha256[:12]}…), and its held-out "
            "part may have been trained on. Put the old shards back."
        )
    stepper = Stepper(run.engine.model, run.accelerator, precision=precision_of(ledger.read()))
    record = text_evaluation(
        config, lambda tensors: stepper.score(tensors, 1, role="infer"),
        after="evaluate", step=run.recipe.total_steps(), start=time.perf_counter(),
    )  # fmt: skip
    ledger.append(record)
    text = (
        f"{record.bits_per_byte:.3f} bits per byte on {record.tokens:,} held-out tokens of {record.text_bytes:,} bytes, on "
        f"{run.accelerator.name}, {duration(record.seconds)}"
    )
    return Answer(text=text, data=record.model_dump(exclude={"schema_version", "kind", "attempt"}))


def _tasks(run: Finished, arguments: Namespace) -> Answer:
    changes = {"eval_seed": arguments.eval_seed, "eval_problems": arguments.problems}
    data = run.recipe.data.model_copy(
        update={name: value for name, value in changes.items() if value is not None}
    )
    course = heldout_only(run.recipe.model_copy(update={"data": data}), run.tokenizer)
    heldout = _heldout(run, data, course.heldout)
    left_out = len(course.heldout) - len(heldout)
    start = time.perf_counter()
    samples = arguments.samples or run.recipe.evaluate.samples
    store = SampleStore(_where(run, data, samples, left_out))
    score = evaluate(
        run.engine, course.prompts(heldout), course.verifier(heldout), samples=samples, ks=(1, 8, samples),
        max_tokens=run.recipe.grpo.max_completion_tokens, seed=run.recipe.seed, answer=course.answer, store=store,
    )  # fmt: skip
    record = Evaluation(
        after="evaluate", step=run.recipe.total_steps(), n=score.problems, samples=score.samples, pass_at_1=score.pass_at_1,
        pass_at_8=score.pass_at.get(8), greedy=score.greedy, truncated_ratio=score.truncated_ratio, seconds=time.perf_counter() - start,
        extra={"mean_completion_tokens": score.mean_tokens, "eval_seed": data.eval_seed, "trained_on_left_out": left_out, **spread(score)}, pool=run.pool,
    )  # fmt: skip
    Ledger(run.folder.ledger).append(record)
    shares = {f"pass@{k}": share for k, share in score.pass_at.items()} | {"greedy": score.greedy}
    if score.majority is not None:
        shares[f"maj@{samples}"] = score.majority
    said = [f"{name} {share:.1%} ({low:.1%} to {high:.1%})" for name, share in shares.items() for low, high in [score.interval(share)]]  # fmt: skip
    text = f"{', '.join(said)}; 95 % intervals, T=1, {record.n} held-out problems x {record.samples} samples{_said(left_out, len(course.heldout))}, seed {data.eval_seed}, on {run.accelerator.name}, {duration(record.seconds)}; every sample: {store.path}"
    gate = run.recipe.evaluate.min_pass_at_1
    failed = gate is not None and record.pass_at_1 < gate
    if failed:
        text += f"\nThe gate evaluate.min_pass_at_1 = {gate} is not reached."
    return Answer(
        text=text,
        data=record.model_dump(exclude={"schema_version", "kind", "attempt"}),
        exit_code=CheckFailed.exit_code if failed else 0,
    )


def _heldout(run: Finished, data: DataConfig, drawn: list[Problem]) -> list[Problem]:
    """Of the problems drawn those that the run did not learn from: the recipe's own held-out ones, and of more or others what is left.

    Raises UsageError when none is, or when the recipe's own have changed since.
    """
    if data == run.recipe.data:
        same_heldout(run.recipe, drawn, Ledger(run.folder.ledger))
        return drawn
    found = corpus.never_trained_on(drawn, run.recipe.data, run.recipe.seed)
    if not found:
        raise UsageError(
            f"All of the {len(drawn)} problems drawn with seed {data.eval_seed} were trained on, so they measure nothing. Leave --eval-seed and "
            f"--problems out for the run's own {run.recipe.data.eval_problems} held-out problems."
        )
    return found


def _said(left_out: int, drawn: int) -> str:
    return (
        f" ({left_out} of the {drawn} drawn were trained on and are left out)" if left_out else ""
    )


def _where(run: Finished, data: DataConfig, samples: int, left_out: int) -> Path:
    """A name that says what was asked of which weights, so that only the same evaluation goes on there."""
    finished = last(Ledger(run.folder.ledger).read(), RunFinished)
    weights = finished.final_weights_sha256[:12] if finished else "unfinished"
    name = f"{weights}-seed{data.eval_seed}-{data.eval_problems}x{samples}-{run.accelerator.name}"
    name += f"-without{left_out}" if left_out else ""
    return run.folder.root / "samples" / f"{name.replace('/', '_')}.jsonl"
