"""What a recipe's model learns, over seeds, beside a control: the same compute spent on more SFT instead of GRPO.

    python benchmarks/demo_learning.py --seeds 0 1 2 --out out/bench
    python benchmarks/demo_learning.py --recipe runs/scarce.toml --seeds 0 1 2 --out out/scarce

Each seed trains the recipe without a fault (`sim:clean`), then its control, one after the other, so that both see the
same machine. The control's SFT steps are chosen so that its measured training seconds equal those of SFT + GRPO. Held-out
problems are drawn with `data.eval_seed`, which no tuning looked at. The fault-free runs double as the guard's false-alarm test:
their incidents are counted. `bascule report OUT/seed-0 --seeds OUT/seed-1 OUT/seed-2` draws the curves of the seeds with their range.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from bascule.ledger import of_kind, read_ledger
from bascule.records import Alarm, StepStats

ROOT = Path(__file__).resolve().parents[1]
UNQUALIFIED = ["qualify.required=false", "qualify.time_limit_s=0.1"]


def fault_free(recipe: Path) -> list[str]:
    """The recipe's first pool becomes a simulated chip without faults, every other the CPU."""
    first, *others = tomllib.loads(recipe.read_text(encoding="utf-8"))["pools"]
    return [
        f"pools.{first}.accelerator=sim:clean@cpu",
        *(f"pools.{name}.accelerator=cpu" for name in others),
    ]


def run(recipe: Path, name: str, out: Path, settings: list[str]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "bascule.cli",
        "run",
        str(recipe),
        "--out",
        str(out),
        "--name",
        name,
        "--json",
    ]
    for setting in [*fault_free(recipe), *UNQUALIFIED, *settings]:
        command += ["--set", setting]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def training_seconds(folder: Path) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for step in of_kind(read_ledger(folder / "ledger.jsonl"), StepStats):
        seconds[step.phase] = seconds.get(step.phase, 0.0) + step.seconds
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=ROOT / "runs" / "demo.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        help="further overrides of the recipe",
    )
    options = parser.parse_args()
    print("| seed | after | pass@1 (T=1) | greedy | pass@8 | training s | alarms |")
    print("|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        base = [f"seed={seed}", *options.settings]
        found = run(options.recipe, f"seed-{seed}", options.out, base)
        seconds = training_seconds(options.out / f"seed-{seed}")
        alarms = len(of_kind(read_ledger(options.out / f"seed-{seed}" / "ledger.jsonl"), Alarm))
        sft_steps = sum(
            1
            for one in of_kind(
                read_ledger(options.out / f"seed-{seed}" / "ledger.jsonl"), StepStats
            )
            if one.phase == "sft"
        )
        show(seed, "SFT", found["eval"]["sft"], seconds["sft"], alarms)
        show(seed, "SFT + GRPO", found["eval"]["grpo"], sum(seconds.values()), alarms)
        steps = round(sft_steps * sum(seconds.values()) / seconds["sft"])
        control = run(
            options.recipe,
            f"control-{seed}",
            options.out,
            [*base, 'train.phases=["sft"]', f"sft.steps={steps}"],
        )
        alarms = len(of_kind(read_ledger(options.out / f"control-{seed}" / "ledger.jsonl"), Alarm))
        show(
            seed,
            f"control: {steps} SFT steps",
            control["eval"]["sft"],
            training_seconds(options.out / f"control-{seed}")["sft"],
            alarms,
        )


def show(seed: int, after: str, score: dict[str, Any], seconds: float, alarms: int) -> None:
    print(
        f"| {seed} | {after} | {score['pass_at_1']:.1%} | {score['greedy']:.1%} | {score['pass_at_8']:.1%} | {seconds:.0f} | {alarms} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
