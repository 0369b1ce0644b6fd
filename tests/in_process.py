"""A whole supervised run inside one process: the real supervisor, trainer and guard, without processes to start.

For campaigns of hundreds of runs and for property tests; a launch costs tens of milliseconds instead of seconds. What only
processes have (a hang, a kill, an engine beside the trainer) is not here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bascule.config.load import recipe_from
from bascule.config.recipe import Recipe
from bascule.errors import BasculeError
from bascule.folder import RunFolder, write_json_atomic
from bascule.guard.watchdog import Ending
from bascule.ledger import Ledger, last
from bascule.records import AnyRecord, Placement, RunFinished, RunStarted
from bascule.stages import trainer
from bascule.stages.place import place_roles
from bascule.stages.setback import Setbacks, Start
from bascule.train.objective import Objective


class Trainer(trainer.Trainer):
    """`wrap` is laid around each phase's objective: a campaign's bad batches."""

    def __init__(self, *arguments: Any, wrap: Callable[[Objective], Objective]) -> None:
        self.wrap = wrap
        super().__init__(*arguments)
        self.objectives = {phase: wrap(one) for phase, one in self.objectives.items()}
        # Evaluation samples, and sampling needs the engine's process.
        self.measure.if_due = lambda after, step: None  # type: ignore[method-assign]


def launch(
    folder: RunFolder,
    ledger: Ledger,
    placement: Placement,
    start: Start,
    wrap: Callable[[Objective], Objective],
) -> Ending:
    made: Trainer | None = None
    try:
        made = Trainer(
            folder, placement.train, ledger.attempt, folder.root / "no-engine", wrap=wrap
        )
        made.run(start)
    except (BasculeError, RuntimeError, MemoryError, OSError) as error:
        on_chip = made is not None and made.accelerator.device.type != "cpu"
        known = trainer.understood(error, on_chip=on_chip)
        if known is None:
            raise
        incident = getattr(known, "incident_id", None)
        return Ending(type(known).__name__, str(known), known.exit_code, incident)
    finally:
        if (
            made is not None
        ):  # as a process that ends does, and one that is killed at least must not go on writing
            made.writer._thread.shutdown(wait=True, cancel_futures=sys.exc_info()[0] is not None)  # fmt: skip
    return Ending(None, "finished", 0)


def recipe(accelerator: str, *, spare: str = "cpu", **settings: Any) -> Recipe:
    """SFT of `settings["sft"]["steps"]` steps on `accelerator`, with `spare` to fall back on. Sections override the small ones."""
    small: dict[str, Any] = {
        "name": "r",
        "prefer": ["chip", "spare"],
        "pools": {"chip": {"accelerator": accelerator}, "spare": {"accelerator": spare}},
        "qualify": {"required": False},
        "model": {"preset": "tick"},
        "data": {"train_problems": 128, "eval_problems": 1},
        "sft": {"steps": 16, "batch_sequences": 8, "warmup_steps": 4},
        "train": {"phases": ["sft"], "snapshot_every_steps": 4},
        "guard": {"checksum_every_steps": 2, "audit_every_steps": 3, "rule_out_rate": 0.02},
    }
    merged = {
        name: {**small.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in settings.items()
    }
    return recipe_from({**small, **merged}, source="in_process")


def run(
    recipe: Recipe, root: Path, wrap: Callable[[Objective], Objective] | None = None
) -> tuple[int, list[AnyRecord]]:
    """Carry the run in `root` as far as it goes, or on from where it was cut off. The exit code and the ledger's records."""
    folder = RunFolder(root).create()
    if not folder.recipe.exists():
        write_json_atomic(folder.recipe, json.loads(recipe.model_dump_json()))
    ledger = Ledger(folder.ledger)
    attempt = 1 + max((record.attempt for record in ledger.read()), default=0)
    ledger = Ledger(folder.ledger, attempt=attempt)
    if attempt == 1:
        ledger.append(RunStarted(name=recipe.name, version="", machine=""))
    if last(ledger.read(), RunFinished):
        return 0, ledger.read()
    setbacks = Setbacks(recipe, folder, ledger, lambda: False)
    laid = wrap or (lambda objective: objective)
    try:
        start = setbacks.settle_unfinished()
        while True:
            placement = place_roles(recipe, ledger)
            ending = launch(folder, ledger, placement, start, laid)
            if ending.error is None:
                break
            start = setbacks.react(placement, ending)
    except BasculeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code, ledger.read()
    return 0, ledger.read()


def weights_of(records: list[AnyRecord]) -> str | None:
    finished = last(records, RunFinished)
    return finished.final_weights_sha256 if finished else None
