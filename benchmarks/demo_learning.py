"""What the demo's model learns, over seeds, beside a control: the same compute spent on more SFT instead of GRPO.

    python benchmarks/demo_learning.py --seeds 0 1 2 --out out/bench

Each seed trains the demo's recipe without a fault (`sim:clean`), then its control, one after the other, so that both see the
same machine. The control's SFT steps are chosen so that its measured training seconds equal those of SFT + GRPO. Held-out
problems are drawn with `data.eval_seed`, which no tuning looked at. The fault-free runs double as the guard's false-alarm test:
their incidents are counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bascule.ledger import of_kind, read_ledger
from bascule.records import Alarm, StepStats

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "runs" / "demo.toml"
FAULT_FREE = ["pools.ascend.accelerator=sim:clean@cpu", "pools.nvidia.accelerator=cpu"]
UNQUALIFIED = ["qualify.required=false", "qualify.time_limit_s=0.1"]


def run(name: str, out: Path, settings: list[str]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "bascule.cli",
        "run",
        str(RECIPE),
        "--out",
        str(out),
        "--name",
        name,
        "--json",
    ]
    for setting in [*FAULT_FREE, *UNQUALIFIED, *settings]:
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
        found = run(f"seed-{seed}", options.out, base)
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
            f"control-{seed}", options.out, [*base, 'train.phases=["sft"]', f"sft.steps={steps}"]
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
