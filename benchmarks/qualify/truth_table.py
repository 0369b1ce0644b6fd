"""How good is the qualification? Every planted fault at three severities against the check that must catch it and the verdicts.

    python benchmarks/qualify/truth_table.py                              every profile, every severity: some 20 core-minutes
    python benchmarks/qualify/truth_table.py --profiles nan dies          some only
    python benchmarks/qualify/truth_table.py --whole                      whole quick batteries instead: some 2 core-hours

Prints markdown and writes figures to --figures. A row is right when a check that promises the fault (Check.catches) failed, each role has
the verdict that the catalogue's `fit_for` says, and the first reason of the verdict names the fault's cluster. Severities that the catalogue marks `unseen`
need not be found and are counted apart: there a finding is luck, and wrong only in a role that the fault leaves alone. To be affordable, questions are put in this process, to one shared workload, and of the dear
checks (trainings, generation, links, snapshots) only those that promise the fault; a role without findings is then "fit" as far as it
was asked. Faults that kill or hang go through child processes, as `bascule qualify` runs them.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.faults.catalogue import SEVERITIES, Profile, open_profile, profiles
from bascule.qualify import examine
from bascule.qualify.battery import run_battery
from bascule.qualify.check import BOTH, CHECKS, asks
from bascule.qualify.checks import numerics
from bascule.qualify.judge import verdicts
from bascule.qualify.trace import Call
from bascule.qualify.workload import Workload
from bascule.records import Evidence, Verdict

NANO = ModelConfig(preset="nano")
CHEAP = ("exact.matmul", "exact.reduction", "coverage.forward", "coverage.training", "numerics.forward", "numerics.backward", "numerics.layers", "numerics.gradients", "numerics.special", "soak.training", "soak.inference")  # fmt: skip
IN_A_CHILD = ("hang", "dies", "hang-all-reduce")
CHILD_CHECKS = ("exact.reduction", "learning.curve", "soak")
# What the first reason of a verdict has to name, by the cluster of the fault.
CLUSTERS = {
    "product": r"exact\.matmul|product|aten::(mm|bmm|addmm|baddbmm|linear|matmul)",
    "softmax": r"softmax|attention",  # fused attention holds its softmax inside
    "attention": r"attention",
    "embedding": r"embedding",
    "top-k": r"top|exact\.reduction",
    "copy": r"aten::(copy_|clone|_to_copy|cat|stack)",
    "special": r"numerics\.special|aten::(rsqrt|exp|sin|cos)|overflow|non-finite",
    "missing": r"is missing|OperatorMissing",
    "memory": r"memory",
    "link": r"links\.",
    "process": r"SIGKILL|hung|hang|silent|AcceleratorError|507015",
    "repeated work": r"soak|determinism|repetition|learning|generation|gradients|resume",
}


@dataclass(frozen=True)
class Row:
    """`named`: for each unfit role, does its first reason name the cluster? `right`: None where nothing can be right or wrong."""

    profile: str
    severity: str
    rows: tuple[str, ...]
    expected: dict[str, str]
    found: dict[str, str]
    unseen: str | None
    caught_by: tuple[str, ...]
    promised: tuple[str, ...]
    named: dict[str, bool]
    reasons: dict[str, str]
    seconds: float

    @property
    def detectable(self) -> bool:
        return self.unseen is None and "unfit" in self.expected.values()

    @property
    def caught(self) -> bool:
        return bool(set(self.caught_by) & set(self.promised)) if self.promised else bool(self.caught_by)  # fmt: skip

    @property
    def verdicts_right(self) -> bool:
        if self.unseen:
            return all(self.found[role] in ("fit", word) for role, word in self.expected.items())
        return self.found == self.expected


def main() -> None:
    arguments = _arguments()
    numerics.question = _remembered(numerics.question)
    work = Workload(NANO, 0)
    rows: list[Row] = []
    print("| planted | plays | train | infer | right | caught by | named | s |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.profiles:
            for severity in arguments.severities:
                profile = open_profile(name)
                if severity != "medium" and not (profile.low if severity == "low" else profile.high):  # fmt: skip
                    continue
                row = _row(f"{name}:{severity}", severity, work, Path(folder), arguments.whole)
                rows.append(row)
                print(_line(row), flush=True)
    print("\n" + _summary(rows))
    for row in rows:
        for role in [role for role, good in row.named.items() if not good and row.detectable]:
            print(
                f"- named otherwise, `{row.profile}:{row.severity}` for {role}: {row.reasons[role]}"
            )
    if arguments.figures:
        arguments.figures.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")  # fmt: skip


def _remembered(question: Any) -> Any:
    """What the reference says of a call is the same for every chip: most of the time of a row, unless it is kept."""
    kept: dict[tuple[int, Any], Any] = {}

    def once(seed: int, call: Call, runner: Any) -> Any:
        place = id(call), runner
        if place not in kept:
            kept[place] = question(seed, call, runner)
        return kept[place]

    return once


def _row(plant: str, severity: str, work: Workload, folder: Path, whole: bool) -> Row:
    profile = open_profile(plant)
    promised = tuple(check.name for check in CHECKS if profile.name in check.catches)
    started_s = time.perf_counter()
    if whole or profile.name in IN_A_CHILD:
        evidence, judged = _in_child(plant, promised, folder, whole)
    else:
        evidence, judged = _here(plant, promised, work, folder)
    against = [item for item in evidence if item.outcome in ("fail", "error")]
    decided = {verdict.role: _word(verdict, whole) for verdict in judged}
    pattern = CLUSTERS.get(profile.cluster, "^$")
    return Row(
        profile=profile.name,
        severity=severity,
        rows=profile.plays,
        expected=_expected(profile),
        found=decided,
        unseen=profile.unseen.get(severity),  # type: ignore[call-overload]
        caught_by=tuple(dict.fromkeys(item.check for item in against)),
        promised=promised,
        named={
            verdict.role: bool(re.search(pattern, verdict.reasons[0]))
            for verdict in judged
            if verdict.verdict == "unfit"
        },
        reasons={verdict.role: verdict.reasons[0] for verdict in judged if verdict.reasons},
        seconds=time.perf_counter() - started_s,
    )


def _expected(profile: Profile) -> dict[str, str]:
    return {role: "fit" if role in profile.fit_for else "unfit" for role in BOTH}


def _word(verdict: Verdict, whole: bool) -> str:
    """A battery in part cannot say fit; what it has nothing against counts as fit here."""
    return verdict.verdict if whole or verdict.verdict == "unfit" else "fit"


def _here(plant: str, promised: tuple[str, ...], work: Workload, folder: Path) -> tuple[list[Evidence], list[Verdict]]:  # fmt: skip
    accelerator = open_accelerator(f"sim:{plant}")
    accelerator.prepare(1)
    context = examine.open_context(accelerator, NANO, quick=True, seed=0, workdir=folder)
    context.workload = work
    evidence: list[Evidence] = []
    for ask in asks(quick=True):
        if ask.check.name in CHEAP or ask.check.name in promised:
            evidence += examine.put(context, ask)
    return evidence, verdicts(evidence, examine.examined(accelerator, NANO))


def _in_child(plant: str, promised: tuple[str, ...], folder: Path, whole: bool) -> tuple[list[Evidence], list[Verdict]]:  # fmt: skip
    only = () if whole else ("exact.reduction", *(promised or CHILD_CHECKS))
    result = run_battery(plant, f"sim:{plant}", NANO, folder / plant.replace(":", "-"), time_limit_s=600, ask_limit_s=180, only=only)  # fmt: skip
    return list(result.evidence), list(result.verdicts)


def _line(row: Row) -> str:
    right = "yes" if row.verdicts_right else "NO"
    if row.unseen:
        right += f" (not to be seen: {row.unseen})"
    elif row.detectable and not row.caught:
        right = f"NO: none of {', '.join(row.promised)}"
    named = ", ".join(f"{role} {'yes' if good else 'NO'}" for role, good in row.named.items()) or "-"  # fmt: skip
    return (
        f"| `{row.profile}:{row.severity}` | {' '.join(row.rows)} | {row.found.get('train')} | {row.found.get('infer')} | {right} "
        f"| {', '.join(row.caught_by) or '-'} | {named} | {row.seconds:.0f} |"
    )


def _summary(rows: list[Row]) -> str:
    within = [row for row in rows if row.detectable]
    caught = sum(row.caught for row in within)
    named = [good for row in within for good in row.named.values()]
    apart = [row for row in rows if row.unseen]
    harmless = [row for row in rows if not row.unseen and not row.detectable]
    return (
        f"{caught} of {len(within)} marked detectable caught by a check that promises them; verdicts of both roles right in "
        f"{sum(row.verdicts_right for row in within)}; the first reason names the right cluster in {sum(named)} of {len(named)} "
        f"({sum(named) / max(1, len(named)):.0%}).\n"
        f"{len(apart)} marked as not to be seen by a quick battery, {sum(row.verdicts_right for row in apart)} of them blamed in no role that they leave alone; "
        f"{sum(row.verdicts_right for row in harmless)} of {len(harmless)} harmless or merely slow ones stay fit. "
        f"{sum(row.seconds for row in rows):.0f} s in all."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profiles", nargs="*", default=profiles(), help="planted faults (all)")
    parser.add_argument("--severities", nargs="*", default=list(SEVERITIES), choices=SEVERITIES)
    parser.add_argument("--whole", action="store_true", help="whole quick batteries, in children")
    parser.add_argument("--figures", type=Path, help="a JSON file for the rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
