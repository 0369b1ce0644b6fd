"""`bascule drill`: run a recipe with a fault planted on its preferred pool, then hold the guard against the ground truth.

The only verb that reads what the simulated chip really did. Works on every real chip: the fault wraps it.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from bascule.config import load_recipe
from bascule.errors import BasculeError, CheckFailed
from bascule.folder import RunFolder
from bascule.ledger import of_kind, read_ledger
from bascule.records import Incident, PoolCondemned, RunFinished
from bascule.stages import run
from bascule.stages.answer import Answer


def main(arguments: Namespace) -> Answer:
    """Exit 3 when a fault that fired was not caught, or when something was caught and nothing had fired."""
    overrides = list(arguments.overrides)
    recipe = load_recipe(Path(arguments.recipe), overrides)
    pool = recipe.order[0]
    base = (
        recipe.pools[pool].accelerator.rpartition("@")[2]
        if recipe.pools[pool].accelerator.startswith("sim:")
        else recipe.pools[pool].accelerator
    )
    base = "cpu" if base.startswith("sim:") else base
    name = arguments.name or f"{recipe.name}-drill"
    planted = f"sim:{arguments.plant}@{base}"
    recipe = load_recipe(
        Path(arguments.recipe),
        [*overrides, f"pools.{pool}.accelerator={planted}", f'name="{name}"'],
    )
    folder = RunFolder(Path(arguments.out) / name)
    ended = "finished"
    try:
        run.run(recipe, folder)
    except BasculeError as error:
        ended = f"{type(error).__name__}: {error}"
    found = hold_against_truth(folder, pool)
    found |= {"planted": planted, "pool": pool, "ended": ended}
    lines = [
        f"planted {planted} on {pool}; the run {ended}",
        f"fired {found['fired']} times, first at training step {found['first_fired_step']}; incidents at steps {found['incident_steps']}; condemned: {found['condemned']}",
        {True: "caught", False: "MISSED", None: "nothing fired, nothing cried: clean"}[
            found["caught"]
        ]
        if not found["false_alarms"]
        else f"FALSE ALARMS: {found['false_alarms']}",
    ]
    good = found["caught"] is not False and not found["false_alarms"]
    return Answer(text="\n".join(lines), data=found, exit_code=0 if good else CheckFailed.exit_code)


def hold_against_truth(folder: RunFolder, pool: str) -> dict[str, Any]:
    """What fired on `pool` in training and rollouts against what the guard and the supervisor recorded."""
    fired = [
        json.loads(line)
        for path in sorted(folder.ground_truth.glob(f"{pool}-*.jsonl"))
        if not path.name.endswith("-qualify.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    records = read_ledger(folder.ledger)
    incidents = [one for one in of_kind(records, Incident) if one.pool == pool]
    condemned = [one for one in of_kind(records, PoolCondemned) if one.pool == pool]
    training = [one["step"] for one in fired if one.get("role") == "train"]
    caught = bool(incidents or condemned) if fired else None
    return {
        "fired": len(fired),
        "first_fired_step": min(training, default=None),
        "incident_steps": [one.step for one in incidents],
        "attributions": [one.attribution for one in incidents],
        "condemned": [one.role for one in condemned],
        "caught": caught,
        "false_alarms": 0 if fired else len(incidents),
        "finished": bool(of_kind(records, RunFinished)),
    }
