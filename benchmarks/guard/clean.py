"""Does the guard ever blame a good chip? Clean training under the real guard, trainer and supervisor, in one process.

    python benchmarks/guard/clean.py [--steps 100000] [--out out/clean.jsonl] [--presets tick,nano]

Cells of 1,000 steps of SFT on the real task, over presets, seeds and settings; a cut campaign goes on where it stopped. The
settings: as recipes have it; seven times the learning rate; batches of two sequences; one batch in fifty with shuffled targets
(spiky but healthy: the answer must be data or optimisation); checks eight times as often; and `sim:jitter`, a chip whose products
differ from the referee's in the last bits, as another vendor's do. A false alarm is an incident that blames the chip, or a pool
condemned; incidents that blame data or optimisation, and warnings, are listed beside it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import campaign
import torch

from bascule import draws
from bascule.records import Alarm, Incident, Migration, PoolCondemned, SnapshotEvent, StepStats
from bascule.train.objective import Batch, Objective

CELL_STEPS = 1000
NEVER_THE_CHIP = ("data", "optimisation", "unknown")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "high rate": {"sft": {"learning_rate": 2.1e-2, "muon_learning_rate": 0.14}},
    "two sequences": {"sft": {"batch_sequences": 2}},
    "bad batches": {},
    "often checked": {"guard": {"checksum_every_steps": 8, "audit_every_steps": 25}},
    "other last bits": {"guard": {"checksum_every_steps": 16, "audit_every_steps": 50}},
}


class Shuffled:
    """One batch in fifty has its targets in random order: loss and gradients jump, and no chip is to blame."""

    def __init__(self, objective: Objective, seed: int) -> None:
        self._objective = objective
        self._seed = seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def next_batch(self, step: int) -> Batch:
        batch = self._objective.next_batch(step)
        if draws.uniform(draws.key(self._seed, "campaign.bad", step), (1,))[0] >= 0.02:
            return batch
        targets = batch.tensors["targets"]
        order = draws.permutation(draws.key(self._seed, "campaign.order", step), targets.numel())
        mixed = targets.flatten()[torch.from_numpy(order)].view_as(targets)
        return replace(batch, tensors={**batch.tensors, "targets": mixed})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--presets", default="tick,tick,tick,tick,nano", help="in turn")
    parser.add_argument("--out", type=Path, default=Path("out/clean.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    presets = options.presets.split(",")
    cells = [
        {
            "preset": presets[number % len(presets)],
            "setting": list(SETTINGS)[number % len(SETTINGS)],
            "seed": number,
        }
        for number in range(-(-options.steps // CELL_STEPS))
    ]
    report(campaign.carry_out(cells, options.out, one_cell))


def one_cell(cell: dict[str, Any]) -> dict[str, Any]:
    setting, seed = cell["setting"], cell["seed"]
    chip = "sim:jitter@cpu" if setting == "other last bits" else "cpu"
    sections = SETTINGS[setting]
    recipe = campaign.in_process.recipe(
        chip,
        seed=seed,
        model={"preset": cell["preset"]},
        data={"train_problems": 2000},
        sft={"steps": CELL_STEPS, "batch_sequences": 4, "warmup_steps": 20, **sections.get("sft", {})},
        train={"snapshot_every_steps": 100},
        guard={**campaign.BY_BUDGET, **sections.get("guard", {})},
    )  # fmt: skip

    def wrap(objective: Objective) -> Objective:
        return Shuffled(objective, seed) if setting == "bad batches" else objective  # type: ignore[return-value]

    start = time.process_time()
    with tempfile.TemporaryDirectory() as room:
        code, records = campaign.quietly(lambda: campaign.in_process.run(recipe, Path(room), wrap))
    incidents = [one for one in records if isinstance(one, Incident)]
    blamed = [one for one in incidents if one.attribution not in NEVER_THE_CHIP]
    return {
        "exit_code": code,
        "steps": sum(isinstance(one, StepStats) for one in records),
        "certified": sum(isinstance(one, SnapshotEvent) and one.state == "certified" for one in records),
        "blamed": [(one.step, one.sentinel, one.attribution, one.evidence) for one in blamed],
        "condemned": sum(isinstance(one, PoolCondemned) for one in records),
        "incidents": Counter(f"{one.sentinel}: {one.attribution}" for one in incidents),
        "alarms": Counter(one.sentinel for one in records if isinstance(one, Alarm)),
        "rollbacks": sum(isinstance(one, Migration) for one in records),
        "cpu_s": time.process_time() - start,
    }  # fmt: skip


def report(results: list[dict[str, Any]]) -> None:
    for setting in SETTINGS:
        rows = [one for one in results if one["cell"]["setting"] == setting]
        incidents = sum((Counter(one["incidents"]) for one in rows), Counter())
        alarms = sum((Counter(one["alarms"]) for one in rows), Counter())
        print(
            f"{setting:16} {sum(one['steps'] for one in rows):7} steps, {sum(one['certified'] for one in rows)} certified, "
            f"{sum(one['rollbacks'] for one in rows)} rollbacks; incidents {dict(incidents) or 'none'}; alarms {dict(alarms) or 'none'}; "
            f"exit codes {dict(Counter(one['exit_code'] for one in rows))}"
        )
    steps = sum(one["steps"] for one in results)
    false = sum(len(one["blamed"]) + one["condemned"] for one in results)
    print(
        f"\nchip blamed {false} times in {steps} clean steps; with 95 % confidence under {(3.0 if not false else 3 + 2 * false) / max(steps, 1):.1e} a step"
    )
    for one in results:
        for blamed in one["blamed"]:
            print(f"  {one['cell']}: {blamed}")


if __name__ == "__main__":
    main()
