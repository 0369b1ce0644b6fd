"""What a recipe's model learns, over seeds, beside a control: the same compute spent on more SFT instead of GRPO.

    python benchmarks/demo_learning.py --seeds 0 1 2 --out out/bench
    python benchmarks/demo_learning.py --recipe runs/teacher.toml --seeds 0 1 2 --out out/teacher

Each seed trains the recipe without a fault (`sim:clean`), then come the controls. A control has as many SFT steps as its seed's own run would
have made in the seconds that its GRPO took; where the machine was not equally busy in both phases, `--control-steps` sets them. The same command goes on where it was cut off. Held-out
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


def told(folder: Path) -> tuple[dict[str, float], int, int]:
    """Of a run's ledger: training seconds by phase, the guard's alarms, SFT steps."""
    records = read_ledger(folder / "ledger.jsonl")
    seconds: dict[str, float] = {}
    for step in of_kind(records, StepStats):
        seconds[step.phase] = seconds.get(step.phase, 0.0) + step.seconds
    sft_steps = sum(one.phase == "sft" for one in of_kind(records, StepStats))
    return seconds, len(of_kind(records, Alarm)), sft_steps


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
    parser.add_argument(
        "--control-steps", type=int, help="SFT steps of a control; default: by the seconds measured"
    )
    options = parser.parse_args()
    print("| seed | after | pass@1 (T=1) | greedy | pass@8 | training s | alarms |")
    print("|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        learn(options.recipe, options.out, seed, options.settings)
    for seed in options.seeds:
        control(options.recipe, options.out, seed, options.settings, options.control_steps)


def learn(recipe: Path, out: Path, seed: int, settings: list[str]) -> None:
    found = run(recipe, f"seed-{seed}", out, [f"seed={seed}", *settings])
    seconds, alarms, _ = told(out / f"seed-{seed}")
    show(seed, "SFT", found["eval"]["sft"], seconds["sft"], alarms)
    show(seed, "SFT + GRPO", found["eval"]["grpo"], sum(seconds.values()), alarms)


def control(
    recipe: Path, out: Path, seed: int, settings: list[str], steps: int | None = None
) -> None:
    """`steps` of SFT, by default as many as the seed's own run would have made in the time that its GRPO took."""
    if steps is None:
        seconds, _, sft_steps = told(out / f"seed-{seed}")
        steps = round(sft_steps * sum(seconds.values()) / seconds["sft"])
    changes = [f"seed={seed}", *settings, 'train.phases=["sft"]', f"sft.steps={steps}"]
    found = run(recipe, f"control-{seed}", out, changes)
    seconds, alarms, _ = told(out / f"control-{seed}")
    show(seed, f"control: {steps} SFT steps", found["eval"]["sft"], seconds["sft"], alarms)


def show(seed: int, after: str, score: dict[str, Any], seconds: float, alarms: int) -> None:
    print(
        f"| {seed} | {after} | {score['pass_at_1']:.1%} | {score['greedy']:.1%} | {score['pass_at_8']:.1%} | {seconds:.0f} | {alarms} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
