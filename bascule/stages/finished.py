"""Open a finished run's model on a chip: what evaluate, chat and serve begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bascule.accelerators.base import Accelerator
from bascule.accelerators.registry import open_accelerator
from bascule.config.load import read_resolved
from bascule.config.recipe import Recipe
from bascule.data.text_tokenizer import open_tokenizer
from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.folder import RunFolder
from bascule.infer.engine import Engine
from bascule.ledger import Ledger
from bascule.model.weights import load_hf
from bascule.place.rollout import compiled_steps
from bascule.stages.placed import infer_choice


@dataclass(frozen=True)
class Finished:
    """A model folder opened for inference. `pool` is None when another accelerator was asked for by name."""

    folder: RunFolder
    recipe: Recipe
    tokenizer: Tokenizer
    accelerator: Accelerator
    engine: Engine
    pool: str | None


def open_finished(run: str, on: str | None) -> Finished:
    """The engine decodes as the run's own rollouts do, or slower where this chip or machine has no compiled steps. Raises UsageError when
    the run has no model yet."""
    folder = RunFolder(Path(run))
    recipe = read_resolved(folder.recipe)
    if not (folder.model / "config.json").exists():
        raise UsageError(
            f"The run {folder.root} has no model yet. Finish it first: bascule run with its recipe."
        )
    name, pool = infer_choice(folder, recipe, on)
    accelerator = open_accelerator(name, seed=recipe.seed)
    accelerator.prepare(recipe.threads)
    ledger = Ledger(folder.ledger, pool=pool)
    if accelerator.fallback_note:
        ledger.warn("accelerator fallback", accelerator.fallback_note)
    native = compiled_steps(recipe, accelerator, ledger)
    tokenizer = open_tokenizer(folder.model)
    model, _ = load_hf(folder.model)
    engine = Engine(
        accelerator.move(model).eval(),
        accelerator,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        native=native,
    )
    return Finished(folder, recipe, tokenizer, accelerator, engine, pool)
