"""How often is `compare-runs` right? Error rates of its three answers, by simulation and on public logs.

    python benchmarks/qualify/calibration.py [LOGS]        about a core-minute; LOGS: a folder of groups of MLPerf results

1. Simulation: curves with the spread, the single jumps and the lengths of the public logs, and a true difference that is known.
2. Splits: each public group of ten halved at random, the halves held against each other. The same experiment: "different" is an error.
3. Leave one submission out: the margin and the window were chosen after looking at these logs, so what the defaults say of them is
   in-sample. Here they are chosen again without the submission that is then judged, by a rule that looks at spreads alone:
   the window with the least spread, and the smallest margin at which ten runs a side have 60 % power.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from bascule.draws import generator, key, permutation
from bascule.qualify import equivalence, runs
from bascule.qualify.runs import MARGIN, Run, compare_groups, read_group

LOGS = Path("../shared/data/mlperf_v5.1_llama31_8b")
ANSWERS = ("equal", "different", "too few runs")
TRIALS = 400
SPLITS = 200
SPREAD = 0.002  # of a run's late log loss in the public groups
NOISE = 0.0035  # of one evaluation
JUMPS = 0.05  # share of evaluations that jump by some percent
WINDOWS = (0.25, 0.4, 0.6)
MARGINS = tuple(0.0005 * step for step in range(2, 21))
POWER = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("logs", nargs="?", type=Path, default=LOGS)
    logs = parser.parse_args().logs
    _simulate()
    if not logs.is_dir():
        print(f"\nNo logs in {logs}: splits and leave-one-out are left away.")
        return
    groups = {path.name: read_group([path]) for path in sorted(logs.iterdir()) if path.is_dir()}
    _split(groups)
    _leave_out(groups)


def _simulate() -> None:
    print("| true difference / margin | runs a side | equal | different | too few runs |\n|---|---|---|---|---|")  # fmt: skip
    for runs_a_side in (3, 5, 10, 20, 40):
        for share in (0.0, 0.5, 1.0, 2.0, 4.0):
            said: Counter[str] = Counter()
            for trial in range(TRIALS if runs_a_side < 40 else TRIALS // 2):
                a = _made(trial, "a", runs_a_side, share * MARGIN)
                found = compare_groups(a, _made(trial, "b", runs_a_side, 0.0)).result
                assert found is not None
                said[found.answer] += 1
            print(f"| {share:g} | {runs_a_side} | {_shares(said)} |", flush=True)


def _made(trial: int, side: str, count: int, difference: float) -> list[Run]:
    draw = generator(key(trial, f"calibration/{side}", count))
    at = 12288.0 * np.arange(1, 15)
    curve = np.log(4.4) - 0.12 * np.log(at / at[0]) + difference
    level = SPREAD * draw.standard_normal((count, 1))
    noise = NOISE * draw.standard_normal((count, len(at)))
    jumps = (draw.random((count, len(at))) < JUMPS) * 0.02 * draw.random((count, len(at)))
    losses = np.exp(curve + level + noise + jumps)
    return [Run(f"{side}{place}", at, row) for place, row in enumerate(losses)]


def _split(groups: dict[str, list[Run]]) -> None:
    print(f"\n| group, halved {SPLITS} times | equal | different | too few runs |\n|---|---|---|---|")  # fmt: skip
    total: Counter[str] = Counter()
    for name, group in groups.items():
        said: Counter[str] = Counter()
        for turn in range(SPLITS):
            order = permutation(key(turn, f"calibration.split/{name}"), len(group)).tolist()
            half = len(group) // 2
            found = compare_groups([group[at] for at in order[:half]], [group[at] for at in order[half:]])  # fmt: skip
            said[found.result.answer if found.result else "refused"] += 1
        total += said
        print(f"| {name} | {_shares(said)} |", flush=True)
    print(f"| all | {_shares(total)} |")


def _leave_out(groups: dict[str, list[Run]]) -> None:
    print("\n| left out | window | margin | held against the others, with these |\n|---|---|---|---|")  # fmt: skip
    for left in groups:
        rest = [group for name, group in groups.items() if name != left]
        window = min(WINDOWS, key=lambda share: _spread(rest, share))
        spread = _spread(rest, window)
        margin = next(m for m in MARGINS if equivalence.power(spread * np.sqrt(2 / 10), 18, m) >= POWER)  # fmt: skip
        print(f"| {left} | {window:g} | {100 * margin:.2f} % | {_judged(groups, left, window, margin)} |")  # fmt: skip
    print(f"\nDefaults: window {runs.WINDOW:g}, margin {100 * MARGIN:.2f} %. Answers of all pairs with the defaults (in-sample):")  # fmt: skip
    said = Counter(compare_groups(groups[a], groups[b]).data()["answer"] for a, b in combinations(groups, 2))  # fmt: skip
    print(", ".join(f"{answer} {count}" for answer, count in sorted(said.items())))


def _judged(groups: dict[str, list[Run]], left: str, window: float, margin: float) -> str:
    kept, runs.WINDOW = runs.WINDOW, window
    try:
        found = {other: compare_groups(groups[left], groups[other], margin=margin).data()["answer"] for other in groups if other != left}  # fmt: skip
    finally:
        runs.WINDOW = kept
    asked = {other: answer for other, answer in found.items() if answer != "refused"}
    words = [f"{other} {answer}" for other, answer in asked.items()]
    return "; ".join([*words, f"{len(found) - len(asked)} refused"])


def _spread(groups: Sequence[Sequence[Run]], window: float) -> float:
    """Median over the groups of the spread of one run's late log loss, as compare_groups computes it."""
    spreads = []
    for group in groups:
        grid = runs.shared_positions(group)
        assert grid is not None
        late = grid[int(len(grid) * (1.0 - window)) :]
        curves = np.array([np.interp(late, run.positions, np.log(run.losses)) for run in group])
        spreads.append(float(np.median(curves - curves.mean(0), axis=1).std(ddof=1)))
    return float(np.median(spreads))


def _shares(said: Counter[str]) -> str:
    total = sum(said.values())
    return " | ".join(f"{said[answer] / total:.1%}" for answer in ANSWERS)


if __name__ == "__main__":
    main()
