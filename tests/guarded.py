"""A small real training run under the guard, for the tests of guard, faults and fallback."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bascule import draws
from bascule.accelerators.base import Accelerator
from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.config.training import Precision, SftConfig
from bascule.config.trust import GuardConfig
from bascule.folder import RunFolder
from bascule.guard.backwards import Older
from bascule.guard.guard import Guard
from bascule.ledger import Ledger, of_kind
from bascule.model import weights
from bascule.model.transformer import Transformer
from bascule.records import Alarm, Incident, SnapshotEvent, StepStats
from bascule.train import checkpoint, loop
from bascule.train.sft import Sft
from bascule.train.state import TrainState
from bascule.train.step import Stepper

VOCABULARY = 32


@functools.cache
def rows(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Count upwards from a start: 512 sequences a small model learns in some ten steps."""
    starts = draws.integers(draws.key(seed, "test.rows"), 12, 512)
    lengths = draws.integers(draws.key(seed, "test.lengths"), 6, 512) + 6
    return [
        ([1, int(a) + 2], [int(a) + 3 + i for i in range(int(n))])
        for a, n in zip(starts, lengths, strict=True)
    ]


@dataclass
class Rig:
    """One launch of a trainer, as stages/trainer joins it. `run` goes on to `steps`; what was recorded is in the properties."""

    stepper: Stepper
    guard: Guard
    objective: Sft
    folder: RunFolder
    ledger: Ledger

    def run(self, steps: int, *, every: int = 5) -> None:
        plan = loop.Plan({"sft": steps}, self.folder.snapshots, every)
        hooks = loop.Hooks(
            on_snapshot=self.guard.after_snapshot, on_step=lambda stats: self.ledger.append(stats)
        )
        state = TrainState()
        path, _ = checkpoint.newest(self.folder.snapshots, "certified")
        if path is not None:
            state, _ = loop.resume(self.stepper, {"sft": self.objective}, path, state)
        loop.run(self.stepper, {"sft": self.objective}, self.guard, state, plan, hooks)

    @property
    def alarms(self) -> list[Alarm]:
        return of_kind(self.ledger.read(), Alarm)

    @property
    def incidents(self) -> list[Incident]:
        return of_kind(self.ledger.read(), Incident)

    @property
    def certified(self) -> list[int]:
        return [
            event.step
            for event in of_kind(self.ledger.read(), SnapshotEvent)
            if event.state == "certified"
        ]

    @property
    def steps(self) -> list[int]:
        return [stats.step for stats in of_kind(self.ledger.read(), StepStats)]


def rig(
    root: Path,
    accelerator: str | Accelerator = "cpu",
    *,
    config: GuardConfig | None = None,
    seed: int = 0,
    batch_sequences: int = 8,
    learning_rate: float = 3e-3,
    muon: float = 0.02,
    preset: str = "tick",
    ffn: Literal["moe", "swiglu"] = "moe",
    precision: Precision = "fp32",
) -> Rig:
    folder = RunFolder(root).create()
    ledger = Ledger(folder.ledger, attempt=1, pool="chip")
    log = folder.ground_truth / "chip.jsonl"
    chip = open_accelerator(accelerator, seed=seed, fault_log=log) if isinstance(accelerator, str) else accelerator  # fmt: skip
    chip.prepare(1)
    model = Transformer(ModelConfig(preset=preset, ffn=ffn, vocab_size=VOCABULARY))
    weights.initialise(model, seed)
    sft = SftConfig(
        steps=400,
        batch_sequences=batch_sequences,
        warmup_steps=5,
        learning_rate=learning_rate,
        muon_learning_rate=muon,
    )
    guard = Guard(
        config or GuardConfig(checksum_every_steps=4, audit_every_steps=7, rule_out_rate=0.05),
        ledger,
        folder,
        "chip",
        accelerator=chip,
        referee=open_accelerator("cpu"),
        snapshots=checkpoint,
        experts_per_token=model.config.num_experts_per_tok,
        older=lambda step, phase: [
            Older(checkpoint.step_of(path), lambda path=path: checkpoint.load(path).model)
            for path in checkpoint.since_certified(folder.snapshots, step, phase)
        ],
    )
    stepper = Stepper(
        chip.move(model), chip, judge=guard, router_bias_speed=1e-3, precision=precision
    )
    return Rig(stepper, guard, Sft(sft, rows(), seed=seed, pad_id=0), folder, ledger)


def truth(root: Path) -> list[int]:
    """Steps in which the simulated chip really did something, from its own log: for tests only."""
    import json

    path = root / "ground_truth" / "chip.jsonl"
    if not path.exists():
        return []
    return sorted({json.loads(line)["step"] for line in path.read_text().splitlines()})


def spread(values: list[float]) -> float:
    return float(np.std(values))
