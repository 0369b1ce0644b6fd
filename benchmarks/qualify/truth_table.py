"""How good is the qualification? Every planted fault against the verdicts, clean batteries, and what each check costs.

    python benchmarks/qualify/truth_table.py                         about 15 minutes on two idle cores
    python benchmarks/qualify/truth_table.py --profiles nan dies     some faults only
    python benchmarks/qualify/truth_table.py --clean 20              that many clean batteries over seeds and models

Prints markdown. Whole quick batteries in child processes, as `bascule qualify` runs them. A fault counts as caught when the verdict
of each role is what the catalogue's `fit_for` says; those that a quick battery cannot see are listed as such (handbook.OUT_OF_REACH).
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

from bascule.config import ModelConfig
from bascule.faults.catalogue import load_profile, profiles
from bascule.qualify.battery import BatteryResult, run_battery
from bascule.qualify.handbook import OUT_OF_REACH
from bascule.records import Evidence

CLEAN_MODELS = (
    ModelConfig(preset="nano"),
    ModelConfig(preset="tick"),
    ModelConfig(preset="nano", attention="gqa", ffn="swiglu", qk_norm=True, num_key_value_heads=2, tie_word_embeddings=False),
)  # fmt: skip


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.profiles:
            _truth_table(arguments.profiles, Path(folder))
        if arguments.clean:
            _clean(arguments.clean, Path(folder))


def _truth_table(names: list[str], folder: Path) -> None:
    print(
        "| planted fault | train | infer | as it should be | caught by | s |\n|---|---|---|---|---|---|"
    )
    right = asked = 0
    for name in names:
        result = run_battery(
            name,
            f"sim:{name}",
            ModelConfig(preset="nano"),
            folder / name,
            time_limit_s=600,
            ask_limit_s=45,
        )
        found = {verdict.role: verdict.verdict for verdict in result.verdicts}
        expected = {
            role: "fit" if role in load_profile(name).fit_for else "unfit" for role in found
        }
        good = found == expected
        word = (
            "yes"
            if good
            else ("out of reach: " + OUT_OF_REACH[name] if name in OUT_OF_REACH else "NO")
        )
        if name not in OUT_OF_REACH:
            asked += 1
            right += good
        caught = ", ".join(dict.fromkeys(item.check for item in _against(result))) or "-"
        print(
            f"| `{name}` | {found['train']} | {found['infer']} | {word} | {caught} | {result.seconds:.0f} |",
            flush=True,
        )
    print(f"\n{right} of {asked} planted faults within reach judged right for both roles.\n")


def _clean(count: int, folder: Path) -> None:
    alarms: list[str] = []
    cost: dict[str, list[float]] = defaultdict(list)
    seconds: list[float] = []
    for place in range(count):
        model = CLEAN_MODELS[place % len(CLEAN_MODELS)]
        result = run_battery(
            "cpu", "cpu", model, folder / f"clean-{place}", time_limit_s=600, seed=place
        )
        alarms += [f"seed {place}, {item.check}: {item.detail}" for item in _against(result)]
        seconds.append(result.seconds)
        for item in result.evidence:
            cost[item.check].append(item.seconds)
    print(
        f"{len(alarms)} false alarms in {count} clean batteries on `cpu`; a battery takes {min(seconds):.0f} to {max(seconds):.0f} s."
    )
    print("\n".join(alarms))
    print("\n| check | mean s per role |\n|---|---|")
    for check, times in cost.items():
        print(f"| `{check}` | {sum(times) / len(times):.2f} |")


def _against(result: BatteryResult) -> list[Evidence]:
    return [item for item in result.evidence if item.outcome in ("fail", "error")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profiles", nargs="*", default=profiles(), help="planted faults (default: all)"
    )
    parser.add_argument(
        "--clean",
        type=int,
        default=6,
        help="clean batteries (default: 6; the bar is 0 alarms in 200)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
