"""`bascule drill`: run a recipe with a fault planted on its preferred pool, then hold the guard against the ground truth.

The only verb that reads what the simulated chip really did. Works on every real chip: the fault wraps it.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bascule.config import load_recipe
from bascule.errors import BasculeError, CheckFailed, Preempted, UsageError
from bascule.faults.catalogue import open_profile
from bascule.folder import RunFolder
from bascule.ledger import of_kind, read_ledger
from bascule.records import Incident, PoolCondemned, RunFinished, Verdict
from bascule.stages import run
from bascule.stages.answer import Answer


def main(arguments: Namespace) -> Answer:
    """Exit 3 when a fault that fired was not caught, when something was caught and nothing had fired, and when nothing fired
    although the profile has faults: then the drill has shown nothing."""
    profile = open_profile(arguments.plant)
    overrides = list(arguments.overrides)
    recipe = load_recipe(Path(arguments.recipe), overrides)
    pool = recipe.order[0]
    name = arguments.name or folder_name(recipe.name, arguments.plant)
    planted = planted_on(recipe.pools[pool].accelerator, arguments.plant)
    recipe = load_recipe(
        Path(arguments.recipe),
        [*overrides, f'pools.{pool}.accelerator="{planted}"', f'name="{name}"'],
    )
    folder = RunFolder(Path(arguments.out) / name)
    ended = "finished"
    try:
        run.run(recipe, folder)
    except (UsageError, Preempted):
        raise  # The drill was not carried out: there is nothing to judge yet.
    except BasculeError as error:
        ended = f"{type(error).__name__}: {error}"
    found = hold_against_truth(folder, pool)
    found |= {"planted": planted, "pool": pool, "ended": ended}
    said, good = judgement(found, has_faults=bool(profile.faults))
    lines = [
        f"planted {planted} on {pool}; the run {ended}",
        f"fired {found['fired']} times, first at training step {found['first_fired_step']}; incidents at steps {found['incident_steps']}; condemned: {found['condemned']}",
        said,
    ]
    return Answer(text="\n".join(lines), data=found, exit_code=0 if good else CheckFailed.exit_code)


def planted_on(accelerator: str, plant: str) -> str:
    """The profile on every choice of `a|b`; a chip that is simulated already gives its base."""
    choices = [choice.strip() for choice in accelerator.split("|")]
    bases = [
        choice.partition("@")[2] or "cpu" if choice.startswith("sim:") else choice
        for choice in choices
    ]
    return "|".join(f"sim:{plant}@{base}" for base in dict.fromkeys(bases))


def folder_name(recipe: str, plant: str) -> str:
    """`NAME-drill-PROFILE`, knobs included: another plant is another run and must not find this one's ledger."""
    return f"{recipe}-drill-{re.sub('[^A-Za-z0-9._-]+', '-', plant)}"


def judgement(found: Mapping[str, Any], *, has_faults: bool) -> tuple[str, bool]:
    """What the drill has shown, in words, and whether that is good."""
    if found["false_alarms"]:
        return f"FALSE ALARMS: {found['false_alarms']}", False
    if found["fired"]:
        return ("caught", True) if found["caught"] else ("MISSED", False)
    if not has_faults:
        return "nothing fired, nothing cried: clean", True
    if found["unfit_for"]:
        return (
            f"caught before the run: qualification found the chip unfit for {', '.join(found['unfit_for'])}",
            True,
        )
    return (
        "NOTHING FIRED: the run was too short, or the faults touch nothing that it does; plant it earlier (?onset_step=N)",
        False,
    )


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
    verdicts = {one.role: one for one in of_kind(records, Verdict) if one.pool == pool}
    training = [one["step"] for one in fired if one.get("role") == "train"]
    caught = bool(incidents or condemned) if fired else None
    return {
        "fired": len(fired),
        "first_fired_step": min(training, default=None),
        "incident_steps": [one.step for one in incidents],
        "attributions": [one.attribution for one in incidents],
        "condemned": [one.role for one in condemned],
        "unfit_for": sorted(role for role, one in verdicts.items() if one.verdict == "unfit"),
        "caught": caught,
        "false_alarms": 0 if fired else len(incidents),
        "finished": bool(of_kind(records, RunFinished)),
    }
