"""Faults that we did not write: the campaign of the lm-resiliency package, planted in our training step by its own injector.

    pip install --no-deps --target /tmp/lmr lm-resiliency==0.2.0
    git clone https://github.com/LMResiliency/lm-resiliency /tmp/lmr-repo         # for the campaign itself
    PYTHONPATH=/tmp/lmr python benchmarks/guard/lm_resiliency_faults.py --campaign /tmp/lmr-repo/tests/validation/fault_injection/campaign.json

Their campaign strikes eight data-parallel ranks over 68 iterations, every iteration replayed by every rank, the majority is right.
Here there is one trainer and a referee of another kind: each incident is played alone, at step 3 of a fresh run of `tick`, with every
product checked, every step audited and a snapshot certified at every step (their detector, too, runs at every iteration); a delay
comes at step 10, because slow is said of a step that others went before. Of an incident on several ranks the first rank's fault is
played. Batches are whole rows, padding and all: an input that is left from the step before, or whose rows change places, needs a
first dimension of rows and the same shape at every step. Adam's moments are struck where our optimizer has such (of a norm; Muon trains the matrices); places that our model
lacks (biases) are said, not counted. Seen by: the first sentinel that suspected the chip; `clean` counts false alarms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import campaign
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import guarded
from lm_resiliency.fault_injection import FaultCampaign, enable_fault_injection

from bascule.config.trust import GuardConfig
from bascule.errors import ChipCondemned, GuardStopped, RollbackNeeded
from bascule.model import seats, weights
from bascule.train import loop
from bascule.train.objective import Batch, Objective
from bascule.train.state import TrainState

AT, DELAYED_AT, AFTER = 3, 10, 3
MATRIX, NORM = "model.layers.0.mlp.down_proj", "model.layers.0.input_layernorm"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--campaign", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/lm_resiliency.jsonl"))
    parser.add_argument("--only", default="", help="incidents whose name matches this pattern")
    options = parser.parse_args()
    torch.set_num_threads(1)
    theirs = json.loads(options.campaign.read_text(encoding="utf-8"))
    incidents = {one["incident_id"]: one for one in theirs["incidents"]}
    cells = [
        {"incident": "clean"},
        *({"incident": name} for name in incidents if re.search(options.only, name)),
    ]
    report(
        campaign.carry_out(
            cells, options.out, lambda cell: one_drill(cell["incident"], incidents, theirs)
        )
    )


def ours(incident: dict[str, Any], theirs: dict[str, Any]) -> FaultCampaign:
    """The incident alone, on the only rank, at our step, on our module."""
    fault = json.loads(json.dumps(incident["faults"][0]))
    fault["target"]["rank"] = 0
    if "module_path" in fault["target"]:
        moments = fault["target"]["surface"] == "optimizer_state"
        fault["target"]["module_path"] = NORM if moments else MATRIX
    moved = {**incident, "faults": [fault], "trigger": {"at": [_at(fault)], "probability": 1.0}}
    return FaultCampaign.from_dict({**theirs, "incidents": [moved]})


def _at(fault: dict[str, Any]) -> int:
    return DELAYED_AT if fault["type"] == "delay" else AT


def _whole_rows(objective: Objective) -> None:
    seated = objective.next_batch

    def next_batch(step: int) -> Batch:
        batch = seated(step)
        rows = {name: one for name, one in batch.tensors.items() if name not in seats.NAMES}
        return replace(batch, tensors=rows)

    objective.next_batch = next_batch  # type: ignore[method-assign]


def _show_moments(clock: torch.optim.Optimizer, stepper: Any) -> None:
    """Their injector looks for moments where a torch optimizer keeps them."""
    for name, parameter in stepper.model.named_parameters():
        for theirs, ours in (("exp_avg", "first"), ("exp_avg_sq", "second")):
            if f"{ours}/{name}" in stepper.kept():
                clock.state[parameter][theirs] = stepper.kept()[f"{ours}/{name}"]


def one_drill(name: str, incidents: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as room, contextlib.ExitStack() as ended:
        config = GuardConfig(checksum_every_steps=1, audit_every_steps=1)
        rig = guarded.rig(Path(room), config=config)
        _whole_rows(rig.objective)
        rig.stepper._replica(
            rig.guard.referee
        )  # a copy of the model as it is before anything hooks it
        clock = torch.optim.SGD(
            rig.stepper.model.parameters(), lr=0.0
        )  # their injector counts its steps
        rig.stepper.begin(rig.objective)
        _show_moments(clock, rig.stepper)
        session, at = None, AT if name == "clean" else _at(incidents[name]["faults"][0])
        if name != "clean":
            try:
                session = enable_fault_injection(rig.stepper.model, clock, campaign=ours(incidents[name], theirs), rank=0)  # fmt: skip
            except (LookupError, TypeError, ValueError) as error:
                return {"injected": False, "why": f"{type(error).__name__}: {error}"}
            ended.callback(session.close)

        def on_step(stats: Any) -> None:
            rig.ledger.append(stats)
            _show_moments(clock, rig.stepper)
            clock.step()

        hooks = loop.Hooks(on_snapshot=rig.guard.after_snapshot, on_step=on_step)
        plan = loop.Plan({"sft": at + AFTER}, rig.folder.snapshots, 1)
        ending = "finished"
        try:
            loop.run(rig.stepper, {"sft": rig.objective}, rig.guard, TrainState(), plan, hooks)
        except (ChipCondemned, GuardStopped, RollbackNeeded) as error:
            ending = type(error).__name__
        except (LookupError, RuntimeError) as error:  # of the injector
            ending = f"{type(error).__name__}: {error}"
        records = session.records if session else ()
        return {
            "injected": any(record.verified for record in records),
            "why": ending,
            "sentinels": [one.sentinel for one in rig.alarms],
            "at": [one.step for one in rig.alarms[:1]],
            "attributions": [one.attribution for one in rig.incidents],
            "weights": weights.fingerprint(rig.stepper.model) if ending == "finished" else None,
        }


def report(results: list[dict[str, Any]]) -> None:
    played = [one for one in results if one["injected"]]
    for one in results:
        seen = f"step {one['at'][0]}, {one['sentinels'][0]}" if one.get("sentinels") else "-"
        said = ", ".join(one.get("attributions", ())) or one["why"][:90]
        planted = "" if one["injected"] else "not planted; "
        print(f"{one['cell']['incident']:45} {planted}{seen:30} {said}")
    slow = [one for one in played if "delay" in one["cell"]["incident"]]
    hit = [one for one in played if one["sentinels"]]
    late = [one for one in hit if one["at"][0] > (DELAYED_AT if one in slow else AT)]
    clean = results[0]["weights"]
    gone_on = [one for one in played if one.get("weights") and one not in slow]
    equal = sum(one["weights"] == clean for one in gone_on)
    print(f"\nplanted {len(played)} of {len(results) - 1}; seen {campaign.said(len(hit), len(played))}, without the {len(slow)} delays {campaign.said(len([o for o in hit if o not in slow]), len(played) - len(slow))}")  # fmt: skip
    print(f"seen later than their step: {len(late)}; first seen by {dict(Counter(one['sentinels'][0] for one in hit))}")  # fmt: skip
    print(f"of {len(gone_on)} other runs that went on, {equal} end with the bits of the run without a fault; alarms without a fault: {len(results[0]['sentinels'])}")  # fmt: skip


if __name__ == "__main__":
    main()
