"""What does watching cost a step? Paired in one run: every kind of step in turn, on the same model and data, CPU seconds.

    python benchmarks/guard/cost.py [--preset nano] [--rounds 12] [--accelerator cpu]

Prints the extra cost of each kind of watched step over an unwatched one, and what the default intervals add up to per step.
Process CPU time on a CPU (wall time on a shared machine says little), wall time elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bascule.accelerators.registry import open_accelerator
from bascule.config import GuardConfig, TrainConfig, recipe_from
from bascule.folder import RunFolder
from bascule.guard.budget import Intervals
from bascule.guard.guard import Guard
from bascule.ledger import Ledger
from bascule.model import weights
from bascule.model.transformer import Transformer
from bascule.stages.course import course
from bascule.train import checkpoint
from bascule.train.sft import Sft
from bascule.train.step import NoJudge, Stepper

NEVER = 10**9
KINDS = {
    "unwatched, guard off": None,
    "unwatched, guard on": Intervals(NEVER, NEVER),
    "checksums": Intervals(1, NEVER),
    "audit": Intervals(NEVER, 1),
    "certification": Intervals(NEVER, NEVER),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room:
        seconds = measure(options.preset, options.rounds, options.accelerator, Path(room))
    report(seconds)


def measure(preset: str, rounds: int, accelerator: str, room: Path) -> dict[str, list[float]]:
    recipe = recipe_from(
        {"name": "cost", "pools": {"chip": {"accelerator": accelerator}}, "model": {"preset": preset}, "data": {"train_problems": 4000, "eval_problems": 16}},
        source="benchmark",
    )  # fmt: skip
    made = course(recipe)
    chip = open_accelerator(accelerator)
    chip.prepare(1)
    model = Transformer(made.model)
    weights.initialise(model, 0)
    stepper = Stepper(chip.move(model), chip, router_bias_speed=1e-3)
    sft = Sft(recipe.sft, made.examples(0), seed=0, pad_id=made.tokenizer.pad_id)
    stepper.begin(sft)
    folder = RunFolder(room).create()
    guard = Guard(
        GuardConfig(), Ledger(folder.ledger), folder, "chip", accelerator=chip, referee=open_accelerator("cpu"),
        snapshots=checkpoint, experts_per_token=made.model.num_experts_per_tok,
    )  # fmt: skip
    clock = time.process_time if chip.device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, every in KINDS.items():
            stepper.judge = NoJudge() if every is None else guard
            guard.every = every or guard.every
            if kind == "certification":
                path = checkpoint.save_snapshot(
                    folder.snapshots,
                    stepper.step,
                    stepper.model_state(),
                    stepper.optimizer.state_dict(),
                    {},
                    {},
                    phase="sft",
                )  # type: ignore[union-attr]
                guard.after_snapshot(stepper.step, path)
            seconds[kind].append(timed(clock, lambda: one_step(stepper, sft)))
    return seconds


def one_step(stepper: Stepper, sft: Sft) -> None:
    proposal = stepper.propose(sft.next_batch(stepper.step + 1))
    if not stepper.judge.judge(proposal, stepper):
        raise SystemExit(
            f"step {proposal.step} was refused: this benchmark needs a chip that computes well"
        )
    stepper.commit(proposal)


def timed(clock: Callable[[], float], work: Callable[[], None]) -> float:
    start = clock()
    work()
    return clock() - start


def report(seconds: dict[str, list[float]]) -> None:
    plain = seconds["unwatched, guard off"]
    extra = {
        kind: statistics.median(a / b for a, b in zip(times, plain, strict=True)) - 1.0
        for kind, times in seconds.items()
    }
    for kind, times in seconds.items():
        print(f"{kind:22} {statistics.median(times) * 1e3:8.1f} ms   {extra[kind]:+7.1%}")
    config, snapshots = GuardConfig(), TrainConfig().snapshot_every_steps
    idle = extra["unwatched, guard on"]
    per_step = (
        idle
        + (extra["checksums"] - idle) / config.checksum_every_steps
        + (extra["audit"] - idle) / config.audit_every_steps
    )
    certified = (extra["certification"] - idle) / snapshots
    print(
        f"\nat the defaults (checksums every {config.checksum_every_steps}, an audit every {config.audit_every_steps}, a snapshot every {snapshots} steps): "
        f"{per_step + certified:+.1%} a step, of which certification {certified:+.1%}"
    )
    print(
        f"full (every step checked and audited): {extra['checksums'] + extra['audit'] - idle:+.0%} a step"
    )


if __name__ == "__main__":
    main()
