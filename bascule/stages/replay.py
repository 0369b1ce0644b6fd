"""`bascule replay`: compute an incident's suspicious step again, on any accelerator, from what the incident folder holds."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
from torch import Tensor

from bascule.accelerators.base import Accelerator
from bascule.accelerators.registry import open_accelerator
from bascule.config.load import read_resolved
from bascule.config.recipe import Recipe
from bascule.config.training import Precision
from bascule.data.shards import Text
from bascule.data.text_tokenizer import open_or_own, sized
from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.folder import RunFolder
from bascule.guard.incident import Case, replay_incident
from bascule.ledger import read_ledger
from bascule.model.transformer import Transformer
from bascule.stages.answer import Answer
from bascule.train.grpo import Grpo
from bascule.train.objective import Batch, Objective
from bascule.train.precision import precision_of
from bascule.train.pretrain import Pretrain, Reading
from bascule.train.sft import Sft
from bascule.train.step import Stepper


def main(arguments: Namespace) -> Answer:
    """Exit 0 whatever is found: this verb measures, the guard has judged."""
    folder = Path(arguments.incident)
    run = _run_of(folder)
    recipe, tokenizer = read_resolved(run.recipe), open_or_own(run.tokenizer)
    accelerator = open_accelerator(arguments.on, seed=recipe.seed)
    accelerator.prepare(recipe.threads)
    whole = functools.partial(_gradients, recipe, tokenizer, precision_of(read_ledger(run.ledger)))
    kept = (folder / "model.safetensors").exists() or not (folder / "product.safetensors").exists()
    report = replay_incident(folder, accelerator, whole if kept else None)
    lines = [
        f"replayed on {report.accelerator}; largest scale-free difference of any gradient from:"
        if kept
        else f"replayed on {report.accelerator}: the product alone, since this incident's weights and gradients were dropped to make room (guard.incidents_gib)"
    ]
    lines += [
        f"  {where:<10} {error:.3e}  {f'({tensor})' if tensor else '(equal bit for bit)'}"
        for where, (error, tensor) in report.errors.items()
    ]
    if report.product_ratio is not None:
        lines.append(
            f"the recorded product, multiplied here: checksum error {report.product_ratio:.3g} times its bound, "
            f"{report.product_error:.3e} from the fp64 product"
        )
    data = {
        "accelerator": report.accelerator,
        "errors": {
            where: {"error": error, "tensor": tensor}
            for where, (error, tensor) in report.errors.items()
        },
        "product_ratio": report.product_ratio,
        "product_error": report.product_error,
    }
    return Answer(text="\n".join(lines), data=data)


def _run_of(folder: Path) -> RunFolder:
    """The run that an incident's folder lies in, as RUN/incidents/ID. Raises UsageError when it is none."""
    parents = folder.resolve().parents
    if not (folder / "incident.json").is_file() or len(parents) < 2:
        raise UsageError(
            f"'{folder}' is no incident's folder (it holds no incident.json). Name one of a run, as RUN/incidents/ID; "
            "`bascule report RUN` lists them."
        )
    return RunFolder(parents[1])


def _gradients(
    recipe: Recipe,
    tokenizer: Tokenizer,
    precision: Precision,
    case: Case,
    accelerator: Accelerator,
) -> Mapping[str, Tensor]:
    model = Transformer(sized(recipe.model, tokenizer))
    model.load_state_dict(case.model)
    stepper = Stepper(accelerator.move(model), accelerator, precision=precision)
    stepper.begin(_objective(recipe, case.phase))
    proposal = stepper.recompute(Batch(case.phase, case.step, case.batch))
    return {name: grad.cpu() for name, grad in proposal.grads.items()}


def _objective(recipe: Recipe, phase: str) -> Objective:
    """An objective for its loss alone: the incident brings the batch, so no data and no sampler are needed."""
    if phase == "pretrain":
        nothing = Reading(Text([], []), 1, np.zeros(0, np.int64))
        return Pretrain(recipe.pretrain, nothing, seed=recipe.seed)
    if phase == "sft":
        return Sft(recipe.sft, [([0], [0])], seed=recipe.seed, pad_id=0)
    return Grpo(
        recipe.grpo,
        [[0]],
        seed=recipe.seed,
        pad_id=0,
        sampler=_unused,
        score=_unused,
        reward=_unused,
    )


def _unused(*_: object) -> NoReturn:
    raise AssertionError("a replay computes a recorded batch; nothing is sampled or scored")
