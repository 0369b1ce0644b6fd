"""What does the guard cost? Two runs of the same recipe in one process, guard on and guard off, step by step in turns.

    python benchmarks/guard/cost.py [--preset nano] [--steps 200] [--cases default,64,full] [--accelerator cpu]

Both runs see the same batches, take the same snapshots (written beside the loop) and must have the same loss at every step, or the
benchmark ends: only then are their times compared. CPU seconds of the process on a CPU, snapshot threads and certification
included; wall time elsewhere. The seconds in the guard's own code are counted apart. The cost is the sum over all steps, so use whole
rounds: 512 steps hold every kind of watched step at the defaults in its share (4 checked, 1 audited). Also prints how long the loop stood still for a snapshot, and what steps of each
kind cost, by their medians: where there is no time for whole rounds their shares add up to the same (`--cases each --warm-up 1 --steps 4`
meets every kind).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bascule.accelerators.base import Accelerator
from bascule.accelerators.registry import open_accelerator
from bascule.config.load import recipe_from
from bascule.config.recipe import Recipe
from bascule.config.training import TrainConfig
from bascule.config.trust import GuardConfig
from bascule.folder import RunFolder
from bascule.guard.guard import Guard
from bascule.ledger import Ledger
from bascule.model import weights
from bascule.model.transformer import Transformer
from bascule.stages.course import Course, course
from bascule.train import loop
from bascule.train.loop import Hooks, Plan
from bascule.train.sft import Sft
from bascule.train.state import TrainState
from bascule.train.step import NoJudge, Stepper
from bascule.train.writer import SnapshotWriter

CASES = {
    "default": GuardConfig(),
    "64": GuardConfig(checksum_every_steps=64, audit_every_steps=256),
    "full": GuardConfig(budget_percent="full"),
    "each": GuardConfig(checksum_every_steps=2, audit_every_steps=3),
}


class Clocked(Guard):
    """Counts the seconds of this thread inside the guard's own code: what the difference of two long steps is too noisy to show. What
    watching slows down in between, the products of a step under checksums, only the difference holds."""

    inside_s = 0.0

    @contextmanager
    def watch(self, *step: Any) -> Iterator[None]:
        begin = time.thread_time()
        with super().watch(*step):
            self.inside_s += time.thread_time() - begin
            yield
            begin = time.thread_time()
        self.inside_s += time.thread_time() - begin

    def judge(self, *step: Any) -> bool:
        begin = time.thread_time()
        try:
            return super().judge(*step)
        finally:
            self.inside_s += time.thread_time() - begin


@dataclass
class Side:
    """One of the two runs."""

    stepper: Stepper
    sft: Sft
    plan: Plan
    writer: SnapshotWriter
    guard: Clocked | None
    clock: Callable[[], float]
    stalls: list[float] = field(default_factory=list)

    def step(self) -> tuple[float, float]:
        """(loss, seconds) of the next step and of the snapshot after it, where one is due."""
        number = self.stepper.step + 1
        start = self.clock()
        proposal = self.stepper.propose(self.sft.next_batch(number))
        if not self.stepper.judge.judge(proposal, self.stepper):
            raise SystemExit(f"step {number} was refused: this benchmark needs a sound chip")
        self.stepper.commit(proposal)
        if self.plan.saves(number):
            self.writer.wait()  # not part of the stall: a real step is longer than a write
            watch = time.perf_counter if self.clock is time.perf_counter else time.thread_time
            begin = watch()
            hooks = Hooks(on_snapshot=self.guard.after_snapshot if self.guard else lambda *_: None)
            loop.save(self.stepper, TrainState(step=number), self.plan, hooks, self.writer)
            self.stalls.append(watch() - begin)
        seconds = self.clock() - start
        return proposal.loss, seconds

    def settle(self) -> float:
        """Seconds that the snapshot threads still need: they belong to this side."""
        start = self.clock()
        self.writer.wait()
        return self.clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--sequences", type=int, help="per step; default: the recipe's")
    parser.add_argument("--warm-up", type=int, default=3, help="pairs of steps before it counts")
    parser.add_argument("--cases", default="default,64,full")
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sft = {"batch_sequences": options.sequences} if options.sequences else {}
    recipe = recipe_from(
        {"name": "cost", "pools": {"chip": {"accelerator": options.accelerator}}, "model": {"preset": options.preset}, "sft": sft,
         "data": {"train_problems": 4000, "eval_problems": 16}},
        source="benchmark",
    )  # fmt: skip
    made = course(recipe)
    for case in options.cases.split(","):
        with tempfile.TemporaryDirectory() as room:
            compare(case, recipe, made, options, Path(room))


def compare(
    case: str, recipe: Recipe, made: Course, options: argparse.Namespace, room: Path
) -> None:
    chip, steps = open_accelerator(options.accelerator), options.steps
    chip.prepare(1)
    on = side(recipe, made, chip, room / "on", CASES[case])
    off = side(recipe, made, chip, room / "off", None)
    for _ in range(options.warm_up):
        pair(on, off, guard_first=True)
    assert on.guard is not None
    found, kinds, inside = [], [], []
    for number in range(steps):
        before = on.guard.inside_s
        found.append(pair(on, off, guard_first=number % 2 == 0))
        inside.append(on.guard.inside_s - before)
        kinds.append(on.guard.watched)
    total_on = sum(one for one, _ in found)
    total_off = sum(other for _, other in found)
    plain = statistics.median(other for _, other in found)
    extra = [(one - other) / plain for one, other in found]
    every = on.guard.every
    print(
        f"{made.model.preset or recipe.model.preset}, {recipe.sft.batch_sequences} sequences a step, {chip.name}; guard: {case} (products every "
        f"{every.checksum}, audit every {every.audit} steps); {steps} steps, equal losses at each: "
        f"a step {plain * 1e3:.1f} ms, guard {total_on / total_off - 1:+.2%} (median step {statistics.median(extra):+.2%})"
    )
    for kind in sorted(set(kinds)):
        cost = [one for one, what in zip(extra, kinds, strict=True) if what == kind]
        own = [one for one, what in zip(inside, kinds, strict=True) if what == kind]
        print(
            f"  {len(cost)} steps with {kind or 'neither'}: {statistics.median(cost):+.2%} (median), "
            f"{statistics.median(own) * 1e3:.2f} ms in the guard's own code, {statistics.median(own) / plain:.2%}"
        )
    stall = statistics.median([*on.stalls, *off.stalls] or [0.0])
    print(
        f"  snapshots: the loop stood still for {stall * 1e3:.1f} ms each, {stall / plain:.1%} of one step, "
        f"{stall / plain / on.plan.snapshot_every_steps:.2%} of all at one every {on.plan.snapshot_every_steps}",
        flush=True,
    )


def side(
    recipe: Recipe, made: Course, chip: Accelerator, room: Path, config: GuardConfig | None
) -> Side:
    folder = RunFolder(room).create()
    model = Transformer(made.model)
    weights.initialise(model, 0)
    stepper = Stepper(chip.move(model), chip, router_bias_speed=1e-3)
    sft = Sft(recipe.sft, made.examples(0), seed=0, pad_id=made.tokenizer.pad_id)
    stepper.begin(sft)
    writer = SnapshotWriter()
    guard = config and Clocked(
        config, Ledger(folder.ledger), folder, "chip", accelerator=chip, referee=open_accelerator("cpu"), snapshots=writer,
        experts_per_token=made.model.num_experts_per_tok,
    )  # fmt: skip
    stepper.judge = guard or NoJudge()
    plan = Plan({"sft": 10**9}, folder.snapshots, TrainConfig().snapshot_every_steps)
    clock = time.process_time if chip.device.type == "cpu" else time.perf_counter
    return Side(stepper, sft, plan, writer, guard, clock)


def pair(on: Side, off: Side, *, guard_first: bool) -> tuple[float, float]:
    """The next step of both; seconds with the guard and without. Ends the program where the losses differ."""
    told = {}
    for which in (on, off) if guard_first else (off, on):
        loss, seconds = which.step()
        told[id(which)] = (loss, seconds + which.settle())
    if told[id(on)][0] != told[id(off)][0]:
        raise SystemExit(f"step {on.stepper.step}: the losses differ, so nothing is compared")
    return told[id(on)][1], told[id(off)][1]


if __name__ == "__main__":
    main()
