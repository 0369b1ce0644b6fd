"""`bascule drill`: rehearse a fault on the owner's own pools, in a folder of its own. Works on every real chip: the fault wraps it.

Where the recipe's run stands half-way in its folder, the drill goes on from a copy of it; else it begins anew. `--all` goes through the
catalogue: every profile at every severity, on chips that were good when they were examined, each held against an undisturbed
run's final weights.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from bascule.config.load import load_recipe
from bascule.config.recipe import Recipe
from bascule.errors import BasculeError, CheckFailed, Preempted, UsageError
from bascule.fallback import rehearsal
from bascule.faults import storage
from bascule.faults.catalogue import SEVERITIES, Profile, load_profile, open_profile, profiles
from bascule.folder import RunFolder, write_json_atomic
from bascule.ledger import last, of_kind, read_ledger
from bascule.records import Placement, RunFinished, SnapshotEvent
from bascule.stages import run
from bascule.stages.answer import Answer, say
from bascule.stages.drilled import Drilled, Sighting, judge, look, story, table
from bascule.stages.faults import families

_FOR_ALL_FAULTS = ['train.rollout_decoder="operators"']
"""Faults of inference need operators, and every cell is held against the same undisturbed run, bit for bit."""


def main(arguments: Namespace) -> Answer:
    """Exit 3 when a fault was missed or called by the wrong name, when a good chip was blamed, when final weights differ from the
    undisturbed run's, and when nothing fired although the profile has faults: then the drill has shown nothing."""
    if arguments.all == bool(arguments.fault):
        raise UsageError("Say what to rehearse: --fault NAME[:low|:high], or --all; `bascule faults` lists the names.")  # fmt: skip
    return _all(arguments) if arguments.all else _one(arguments)


# ---- one drill


def _one(arguments: Namespace) -> Answer:
    fault = placed_at(arguments.fault, arguments.at_step)
    recipe = load_recipe(Path(arguments.recipe), list(arguments.overrides))
    refuse_too_late(arguments.at_step, recipe)
    name = arguments.name or folder_name(recipe.name, fault)
    folder = RunFolder(Path(arguments.out) / name)
    owner = RunFolder(Path(arguments.out) / recipe.name)
    pool = _training_pool(recipe, folder if folder.ledger.exists() else owner)
    planted = _planted(arguments, pool, fault, name)
    if not folder.ledger.exists() and owner.ledger.exists():
        why = rehearsal.copy_run(owner, folder.create(), planted)
        say(f"the drill begins anew ({owner.root}: {why})" if why else f"the drill goes on from a copy of {owner.root}")  # fmt: skip
    drilled = carry_out(planted, folder, fault, pool)
    judge(drilled, open_profile(fault))
    code = 0 if drilled.good else CheckFailed.exit_code
    return Answer(text="\n".join(story(drilled)), data=drilled.as_data(), exit_code=code)


def carry_out(recipe: Recipe, folder: RunFolder, fault: str, pool: str) -> Drilled:
    """Run to the end, whatever end that is; damage files on the way when the fault is one of storage."""
    book = folder.root / "drill.json"
    if not book.exists():
        earlier = max((record.attempt for record in read_ledger(folder.ledger)), default=0)
        write_json_atomic(book, {"from_attempt": earlier + 1})
    drilled = Drilled(fault, recipe.pools[pool].accelerator, pool, "finished", 0)
    profile = open_profile(fault)
    try:
        if "storage" in families(profile):
            _damage_halfway(recipe, folder, profile, pool)
        run.run(recipe, folder)
    except (UsageError, Preempted):
        raise  # The drill was not carried out: there is nothing to judge yet.
    except BasculeError as error:
        drilled.ended, drilled.exit_code = f"{type(error).__name__}: {error}", error.exit_code
    look(drilled, folder, from_attempt=json.loads(book.read_text())["from_attempt"])
    return drilled


def _damage_halfway(recipe: Recipe, folder: RunFolder, profile: Profile, pool: str) -> None:
    """Stop the run at a snapshot from the fault's onset on, damage what was written last, and leave the rest to the resume."""
    log = folder.ground_truth / f"{pool}-storage.jsonl"
    if log.exists():
        return
    onset = profile.faults[0].onset_step

    def reached() -> bool:
        saved = of_kind(read_ledger(folder.ledger), SnapshotEvent)
        return any(one.step >= onset for one in saved)

    try:
        run.run(recipe, folder, stop_when=reached)
    except Preempted:
        newest = sorted(folder.snapshots.glob("step-*"))[-1]
        step = int(newest.name.removeprefix("step-"))
        for spec in profile.faults:
            touched = storage.damage(spec, newest / "model.safetensors", step=step)
            if touched:
                entry = {"step": step, "fault": spec.kind, "detail": touched.detail}
                log.parent.mkdir(exist_ok=True)
                log.write_text(json.dumps(entry) + "\n", encoding="utf-8")


def placed_at(fault: str, at_step: int | None) -> str:
    """`fault` with every window of its profile moved so that it begins at `at_step`; a fault of inference alone stays."""
    profile = open_profile(fault)
    if at_step is None or not any("train" in spec.roles for spec in profile.faults):
        return fault
    knobs = [f"onset_step={at_step}"]
    ends = [spec.until_step - spec.onset_step for spec in profile.faults if spec.until_step]
    knobs += [f"until_step={at_step + max(ends)}"] if ends else []
    return f"{fault}{'&' if '?' in fault else '?'}{'&'.join(knobs)}"


def refuse_too_late(at_step: int | None, recipe: Recipe) -> None:
    """Raises UsageError: the answer would be that nothing fired, and it would take a whole run to say so."""
    if at_step is not None and at_step > recipe.total_steps():
        raise UsageError(f"--at-step {at_step} is after the end of the run, which has {recipe.total_steps()} steps: nothing would fire. Name a step from 1 to {recipe.total_steps()}.")  # fmt: skip


def planted_on(accelerator: str, fault: str) -> str:
    """The profile on every choice of `a|b`; a chip that is simulated already gives its base."""
    choices = [choice.strip() for choice in accelerator.split("|")]
    bases = [
        choice.partition("@")[2] or "cpu" if choice.startswith("sim:") else choice
        for choice in choices
    ]
    return "|".join(f"sim:{fault}@{base}" for base in dict.fromkeys(bases))


def folder_name(recipe: str, fault: str) -> str:
    """`NAME-drill-FAULT`, knobs included: another fault is another run and must not find this one's ledger."""
    return f"{recipe}-drill-{re.sub('[^A-Za-z0-9._-]+', '-', fault)}"


def _planted(arguments: Namespace, pool: str, fault: str, name: str) -> Recipe:
    overrides = [*_FOR_ALL_FAULTS, *arguments.overrides] if arguments.all else list(arguments.overrides)  # fmt: skip
    plain = load_recipe(Path(arguments.recipe), overrides)
    planted = json.dumps(planted_on(plain.pools[pool].accelerator, fault))
    family = plain.pools[pool].chip_of
    if family:  # of a pool of several chips the fault strikes the one that trains
        chips = {one: json.dumps(plain.pools[one].accelerator) for one in (pool, *plain.siblings(pool))}  # fmt: skip
        chips[pool] = planted
        planted = f"[{', '.join(chips[one] for one in sorted(chips, key=list(plain.pools).index))}]"
    changes = [f"pools.{family or pool}.accelerator={planted}", f'name="{name}"']
    return load_recipe(Path(arguments.recipe), [*overrides, *changes])


def _training_pool(recipe: Recipe, folder: RunFolder) -> str:
    """The pool that trains now, or would first: the one whose fault matters."""
    placed = last(read_ledger(folder.ledger), Placement)
    return placed.train if placed else recipe.order[0]


# ---- the truth table


def _all(arguments: Namespace) -> Answer:
    recipe = load_recipe(Path(arguments.recipe), list(arguments.overrides))
    refuse_too_late(arguments.at_step, recipe)
    room = Path(arguments.out) / (arguments.name or f"{recipe.name}-drill-all")
    pool, at_step = recipe.order[0], arguments.at_step or 1 + recipe.total_steps() // 3
    say("drill: first the undisturbed run")
    undisturbed = RunFolder(room / "undisturbed")
    run.run(_planted(arguments, pool, "clean", "undisturbed"), undisturbed)
    ended = last(read_ledger(undisturbed.ledger), RunFinished)
    assert ended is not None
    cells = list(_cells(arguments.seeds, at_step))
    drills = []
    for number, fault in enumerate(cells, start=1):
        say(f"drill {number}/{len(cells)}: {fault}")
        drills.append(_cell(arguments, room, fault, pool, undisturbed, ended.final_weights_sha256))
        say("drill: " + drills[-1].verdict)
    good = all(one.good for one in drills)
    data = {"cells": [one.as_data() for one in drills], "undisturbed": ended.final_weights_sha256}
    return Answer(text="\n".join(table(drills)), data=data, exit_code=0 if good else CheckFailed.exit_code)  # fmt: skip


def _cells(seeds: int, at_step: int) -> Iterator[str]:
    for name in profiles():
        profile = load_profile(name)
        for severity in SEVERITIES:
            if severity != "medium" and not getattr(profile, severity):
                continue
            for seed in range(seeds):
                fault = name if severity == "medium" else f"{name}:{severity}"
                yield placed_at(f"{fault}?seed={seed}" if seed else fault, at_step)


def _cell(
    arguments: Namespace, room: Path, fault: str, pool: str, examined: RunFolder, right: str
) -> Drilled:
    """One cell; its answer lies in its folder, so a table that was cut off goes on."""
    folder = RunFolder(room / folder_name("cell", fault))
    answer = folder.root / "answer.json"
    if answer.exists():
        found = json.loads(answer.read_text(encoding="utf-8"))
        return Drilled(**{**found, "seen": [Sighting(**one) for one in found["seen"]]})
    planted = _planted(arguments, pool, fault, folder.root.name)
    if not folder.ledger.exists():
        rehearsal.fresh_run(examined, folder, planted)
    drilled = carry_out(planted, folder, fault, pool)
    judge(drilled, open_profile(fault), right)
    write_json_atomic(answer, drilled.as_data())
    return drilled
