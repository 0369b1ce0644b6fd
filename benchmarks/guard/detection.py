"""Of faults that matter, how many are seen before a snapshot is certified, and are they called by their right name?

    python benchmarks/guard/detection.py [--seeds 5] [--mix 60] [--preset tick] [--out out/detection.jsonl] [--groups mix,...] [--only REGEX]

Whole supervised runs in one process (real trainer, guard, supervisor, policy; no engine): 24 steps of SFT on the real task,
snapshots every 8 steps, checks at the defaults (products every 128th step, audits every 256th), the fault from a random
step on. Each faulty run is also made without a guard, and held against the clean run and against runs whose first weights were
moved by one unit in the last place: a fault is consequential when it moves the final weights further than the furthest of those.
A certified state is corrupt when it lies further from the clean run's than theirs do at that step; one that differs by less is
listed as a trace. A fault in the last bits acts at every step, so its states are also held against runs whose weights move by one unit
in the last place before each step: what lies within that response is told apart.

    mix        the realistic mix in 0.2 to 10 % of the products, to the end of the run: of a hundred runs 51 lose values to 0, 48 have
               several bits of a value flipped, one meets NaN
    one-off    the same in one step only, at the defaults: a guard that samples sees what it looks at
    mix full, one-off full   a third of them (the rarest rate) with `budget_percent = "full"`
    catalogue  every profile that acts in one trainer's process, at each severity
    snapshot   torn, flipped, lost or stale files of the newest snapshot, found by a run that goes on
    processes  hangs and deaths: the same run with real processes, as `bascule drill --all` has it

A straggler and a leak are only seen on chips that report memory and on an idle machine; collectives need several ranks
(tests/guard/test_replicas.py, tests/faults/test_other_families.py).
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import campaign
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bascule import draws, numerics
from bascule.fallback import rehearsal
from bascule.faults import storage
from bascule.faults.catalogue import SEVERITIES, FaultSpec, load_profile, open_profile, profiles
from bascule.folder import RunFolder, sha256_of
from bascule.ledger import read_ledger
from bascule.records import Alarm, Incident, SnapshotEvent, Warned
from bascule.stages import drill, run
from bascule.stages.drill import placed_at
from bascule.stages.drilled import Drilled, judge, look
from bascule.stages.faults import families
from bascule.train import checkpoint
from bascule.train.objective import Objective

STEPS, EVERY, LAST_ONSET = 24, 8, 14
MIX = {"zeroed": 0.51, "bit_flip": 0.48, "nan": 0.01}
RATES, STRIDES = (0.002, 0.02, 0.1), (61, 499)
GROUPS = ("mix", "mix full", "one-off", "one-off full", "catalogue", "snapshot", "processes")
ELSEWHERE = {"collective", "storage", "timing"}
PROCESSES = {"process_death", "hang"}
NUDGES = 4
"""Runs from weights moved by one ulp, each in other directions: the response is the furthest of them."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--mix", type=int, default=60, help="cells of each mix")
    parser.add_argument("--preset", default="tick")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--out", type=Path, default=Path("out/detection.jsonl"))
    parser.add_argument("--only", default="", help="cells whose fault matches this pattern")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = options.groups.split(",")
    cells = [
        {"preset": options.preset, **cell}
        for cell in _cells(options.seeds, options.mix)
        if cell["group"] in wanted and re.search(options.only, cell["fault"])
    ]
    report(campaign.carry_out(cells, options.out, one_cell))


def _cells(seeds: int, mix: int) -> Iterator[dict[str, Any]]:
    for number in range(mix):
        rng = np.random.default_rng(number)
        rate, stride = RATES[number % len(RATES)], STRIDES[number // len(RATES) % len(STRIDES)]
        onset = int(rng.integers(2, LAST_ONSET + 1))
        kind = str(rng.choice(list(MIX), p=list(MIX.values())))
        struck = f"corrupt?kind={kind}&amount=null&rate={rate}&stride={stride}&onset_step={onset}&seed={number}"
        yield {"group": "mix", "fault": struck}
        once = f"{struck}&until_step={onset}&transient=true"
        yield {"group": "one-off", "fault": once}
        if number % 3 == 0:  # the rarest rate, which sampling misses most
            yield {"group": "mix full", "fault": struck}
            yield {"group": "one-off full", "fault": once}
    for seed in range(seeds):
        for kind in ("torn_write", "flipped_write", "lost_write", "stale"):
            yield {"group": "snapshot", "fault": kind, "seed": seed}
        for kind in ("hang", "dies"):
            yield {"group": "processes", "fault": kind, "seed": seed}
        for fault in _catalogue(seed):
            yield {"group": "catalogue", "fault": fault}


def _catalogue(seed: int) -> Iterator[str]:
    onset = int(np.random.default_rng(1000 + seed).integers(2, LAST_ONSET + 1))
    for name in profiles():
        profile = load_profile(name)
        kinds = {spec.kind for spec in profile.faults}
        if families(profile) & ELSEWHERE or kinds & PROCESSES:
            continue
        for severity in SEVERITIES:
            if severity == "medium" or getattr(profile, severity):
                fault = f"{name}:{severity}?seed={seed}"
                yield placed_at(fault, onset)


# ---- one cell


def one_cell(cell: dict[str, Any]) -> dict[str, Any]:
    if cell["group"] == "snapshot":
        return campaign.quietly(lambda: _snapshot(cell))  # type: ignore[no-any-return]
    if cell["group"] == "processes":
        return campaign.quietly(lambda: _drill(cell))  # type: ignore[no-any-return]
    return campaign.quietly(lambda: _fault(cell))  # type: ignore[no-any-return]


def _fault(cell: dict[str, Any]) -> dict[str, Any]:
    fault, preset = cell["fault"], cell["preset"]
    full = {"budget_percent": "full"} if cell["group"].endswith("full") else {}
    with tempfile.TemporaryDirectory() as room:
        free, held = Path(room) / "free", Path(room) / "held"
        campaign.in_process.run(_recipe(f"sim:{fault}@cpu", preset, {"enabled": False}), free)
        code, records = campaign.in_process.run(_recipe(f"sim:{fault}@cpu", preset, full), held)
        moved = _distance(free, preset, STEPS)
        drilled = Drilled(fault, fault, "chip", "", code)
        look(drilled, RunFolder(held))
        judge(drilled, open_profile(fault), campaign.in_process.weights_of(list(_clean(preset)[2])))
        differ = _differing(held, free, records, preset)
    return {
        "fired_at": drilled.first_fired_step,
        "moved": moved,
        "consequential": moved is None or moved > _nudged(preset)[STEPS],
        "seen": bool(drilled.attributions or drilled.condemned),
        "by": drilled.seen[0].by if drilled.seen else None,
        "seen_at": drilled.seen[0].step if drilled.seen else None,
        "attributions": drilled.attributions,
        "condemned": drilled.condemned,
        "innocent": drilled.innocent_condemned,
        "corrupt_certified": sorted(
            step
            for step, away in differ.items()
            if not (math.inf if away is None else away) <= _nudged(preset)[step]
        ),
        "traces_certified": differ,
        "exit_code": code,
        "weights_equal": drilled.weights_equal,
        "verdict": drilled.verdict,
    }


def _snapshot(cell: dict[str, Any]) -> dict[str, Any]:
    """Stop after 24 steps as if killed before the end, damage the newest snapshot, go on from the folder."""
    kind, seed, preset = cell["fault"], cell["seed"], cell["preset"]
    with tempfile.TemporaryDirectory() as room:
        shutil.copytree(_clean(preset)[1], room, dirs_exist_ok=True)
        folder = RunFolder(Path(room))
        lines = folder.ledger.read_text(encoding="utf-8").splitlines(keepends=True)
        folder.ledger.write_text("".join(one for one in lines if '"kind":"run_finished"' not in one))  # fmt: skip
        newest, older = checkpoint.path_of(folder.snapshots, STEPS), checkpoint.path_of(folder.snapshots, STEPS - EVERY)  # fmt: skip
        if kind == "stale":
            shutil.rmtree(newest)
            shutil.copytree(older, newest)
        else:
            name = ("model", "optimizer", "state")[seed % 3]
            file = newest / ("state.json" if name == "state" else f"{name}.safetensors")
            storage.damage(FaultSpec(kind=kind, seed=seed), file, step=STEPS)
        code, records = campaign.in_process.run(_recipe("cpu", preset, {}), Path(room))
    passed = [
        one.detail for one in records if isinstance(one, Warned) and "passed over" in one.what
    ]
    equal = campaign.in_process.weights_of(records) == campaign.in_process.weights_of(list(_clean(preset)[2]))  # fmt: skip
    return {"seen": bool(passed), "by": "snapshot passed over" if passed else None, "consequential": True,
            "weights_equal": equal, "exit_code": code, "attributions": [], "condemned": [], "innocent": [],
            "corrupt_certified": [], "seen_at": STEPS, "verdict": "caught" if passed and equal else "MISSED"}  # fmt: skip


def _drill(cell: dict[str, Any]) -> dict[str, Any]:
    """A hang or a death at a random step of a run with real processes, as `bascule drill --all` does it."""
    onset = int(np.random.default_rng(2000 + cell["seed"]).integers(2, LAST_ONSET + 1))
    fault, pool = placed_at(f"{cell['fault']}?seed={cell['seed']}", onset), "chip"
    examined, right = _examined(cell["preset"])
    planted = _recipe(drill.planted_on("cpu", fault), cell["preset"], {"hang_timeout_s": 8.0})
    with tempfile.TemporaryDirectory() as room:
        folder = RunFolder(Path(room) / "run")
        rehearsal.fresh_run(examined, folder, planted)
        drilled = drill.carry_out(planted, folder, fault, pool)
        judge(drilled, open_profile(fault), right)
    by = drilled.seen[0] if drilled.seen else None
    return {"fired_at": drilled.first_fired_step, "moved": None, "consequential": True, "seen": bool(drilled.attributions),
            "by": by and by.by, "seen_at": by and by.step, "attributions": drilled.attributions, "condemned": drilled.condemned,
            "innocent": drilled.innocent_condemned, "corrupt_certified": [], "exit_code": drilled.exit_code,
            "weights_equal": drilled.weights_equal, "verdict": drilled.verdict}  # fmt: skip


@cache
def _examined(preset: str) -> tuple[RunFolder, str | None]:
    """A whole run on a sound chip, whose verdicts the drills begin with; its final weights."""
    folder = RunFolder(Path(tempfile.mkdtemp()) / "run")
    run.run(_recipe("cpu", preset, {}), folder)
    return folder, campaign.in_process.weights_of(read_ledger(folder.ledger))


def _recipe(accelerator: str, preset: str, guard: dict[str, Any]) -> Any:
    return campaign.in_process.recipe(
        accelerator, model={"preset": preset}, sft={"steps": STEPS},
        train={"snapshot_every_steps": EVERY, "keep_snapshots": 100},
        guard={**campaign.BY_BUDGET, **guard},
    )  # fmt: skip


# ---- what it is held against


@cache
def _clean(preset: str) -> tuple[dict[int, str], Path, tuple[Any, ...]]:
    """(snapshot step -> hash of the weights, the folder, its records) of the run without a fault."""
    folder = Path(tempfile.mkdtemp())
    _, records = campaign.in_process.run(_recipe("cpu", preset, {}), folder)
    assert not [one for one in records if isinstance(one, Incident | Alarm)]
    return _states(folder), folder, tuple(records)


@cache
def _nudged(preset: str, always: bool = False) -> dict[int, float]:
    """Snapshot step -> how far weights have gone by then when the first ones were moved by one unit in the last place; `always`: and
    again before each step."""
    furthest: dict[int, float] = {}
    for number in range(NUDGES):
        with tempfile.TemporaryDirectory() as room:
            recipe = _recipe("cpu", preset, {"enabled": False})
            campaign.in_process.run(
                recipe, Path(room), lambda one, n=number: Nudged(one, n, always)
            )
            for step in _states(Path(room)):
                moved = _distance(Path(room), preset, step)
                assert moved is not None
                furthest[step] = max(moved, furthest.get(step, 0.0))
    return furthest


class Nudged:
    """The first weights moved by one unit in the last place, when the optimizer is made; `always`: and before each step."""

    def __init__(self, objective: Objective, seed: int, always: bool) -> None:
        self._objective, self._seed, self._always = objective, seed, always
        self._model: nn.Module | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def new_optimizer(self, model: nn.Module) -> Any:
        if self._model is None:
            self._model = model
            self._nudge(0)
        return self._objective.new_optimizer(model)

    def next_batch(self, step: int) -> Any:
        if self._always:
            self._nudge(step)
        return self._objective.next_batch(step)

    @torch.no_grad()
    def _nudge(self, step: int) -> None:
        assert self._model is not None
        for number, parameter in enumerate(self._model.parameters()):
            key = draws.key(self._seed, "campaign.nudge", number, step)
            parameter.copy_(numerics.perturb_one_ulp(parameter, key))


def _differing(
    held: Path, unguarded: Path, records: list[Any], preset: str
) -> dict[int, float | None]:
    """Step -> distance from the clean run's weights, of each snapshot certified on the chip whose bits are not the clean run's. One
    that a rollback has since written anew is gone: what the run without a guard had at that step stands for it."""
    states, clean = {held: _states(held), unguarded: _states(unguarded)}, _clean(preset)[0]
    found: dict[int, float | None] = {}
    for one in records:
        if isinstance(one, SnapshotEvent) and one.state == "certified" and one.pool == "chip":
            path = checkpoint.path_of(held / "snapshots", one.step)
            same = path.exists() and checkpoint.sha256(path) == one.sha256
            root = held if same else unguarded
            if states[root].get(one.step) != clean.get(one.step):
                found[one.step] = _distance(root, preset, one.step)
    return found


def _states(folder: Path) -> dict[int, str]:
    return {
        checkpoint.step_of(path): sha256_of(path / "model.safetensors")
        for path in sorted((folder / "snapshots").glob("step-*"))
    }


def _distance(folder: Path, preset: str, step: int) -> float | None:
    """||weights after `step` - clean ones|| / ||clean ones||; None when there is no finite such state."""
    path = checkpoint.path_of(folder / "snapshots", step)
    if not path.exists():
        return None
    clean = _weights(checkpoint.path_of(_clean(preset)[1] / "snapshots", step))
    found = _weights(path)
    away = sum(
        float((found[name].double() - clean[name].double()).square().sum()) for name in clean
    )
    size = sum(float(clean[name].double().square().sum()) for name in clean)
    return (away / size) ** 0.5 if np.isfinite(away) else None


def _weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


# ---- the answer


def _beyond(one: dict[str, Any]) -> bool:
    moved = _nudged(one["cell"]["preset"], always=True)
    return any(
        away is None or away > moved[int(step)] for step, away in one["traces_certified"].items()
    )


def report(results: list[dict[str, Any]]) -> None:
    for group in GROUPS:
        rows = [one for one in results if one["cell"]["group"] == group]
        if not rows:
            continue
        fired = [one for one in rows if group == "snapshot" or one["fired_at"] is not None]
        heavy = [one for one in fired if one["consequential"]]
        seen = [one for one in heavy if one["seen"] and not one["corrupt_certified"]]
        named = [one for one in heavy if one["seen"] and not one["verdict"].startswith("caught, but called")]  # fmt: skip
        print(
            f"{group}: {len(rows)} runs, in {len(fired)} the fault acted, in {len(heavy)} it was consequential"
        )
        print(
            f"  seen before a corrupt state was certified  {campaign.said(len(seen), len(heavy))}"
        )
        if group != "snapshot":
            print(f"  called by a right name, of those seen       {campaign.said(len(named), sum(one['seen'] for one in heavy))}")  # fmt: skip
        print(f"  runs in which a corrupt state was certified {sum(bool(one['corrupt_certified']) for one in rows)}; innocent pools condemned {sum(bool(one['innocent']) for one in rows)}")  # fmt: skip
        print(f"  inconsequential, yet seen                   {sum(one['seen'] for one in fired if not one['consequential'])} of {len(fired) - len(heavy)}")  # fmt: skip
        beyond = sum(_beyond(one) for one in rows if one.get("traces_certified"))
        print(f"  of these, beyond the response to one ulp before each step   {beyond}")
        traces = sum(bool(set(map(int, one.get("traces_certified", {}))) - set(one["corrupt_certified"])) for one in rows)  # fmt: skip
        print(f"  runs in which a state with a lesser trace was certified (within one ulp's response)  {traces}")  # fmt: skip
        finished = [one for one in fired if one["exit_code"] == 0]
        equal = sum(bool(one["weights_equal"]) for one in finished)
        print(f"  final weights equal the clean run's         {equal} of {len(finished)} that finished")  # fmt: skip
        for one in rows:
            good = one in seen or (one in fired and not one["consequential"]) or one not in fired
            if not good or one["corrupt_certified"] or one["innocent"]:
                print(f"    {one['cell']['fault']}: {one['verdict']}; seen by {one['by']} at {one['seen_at']}, fired at {one.get('fired_at')}, moved {one.get('moved')}, corrupt certified {one['corrupt_certified']}, traces {one.get('traces_certified')}")  # fmt: skip


if __name__ == "__main__":
    main()
