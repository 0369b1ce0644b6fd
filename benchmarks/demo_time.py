"""Where the demo's time goes, and whether its budget of ten minutes on 2 cores is kept.

    python benchmarks/demo_time.py              # runs runs/demo.toml first
    python benchmarks/demo_time.py out/demo     # a run that exists

Every stretch of wall time between two records of the ledger is booked on what the later record tells of, so the rows add up to the
whole run; the time from the last record to the end of the process is booked too when the run is made here. CPU time is that of the run's
processes. On a machine that others use, wall time says little: read the CPU column's total.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

BUDGET_S = 600.0
SHOWN = {"evidence": "qualify", "verdict": "qualify", "option_priced": "plan", "snapshot": "snapshots"}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run that exists")
    options = parser.parse_args()
    if options.run:
        spent = booked(options.run)
        return shown(spent, sum(spent.values()), None)
    with tempfile.TemporaryDirectory() as out:
        begun, before = time.time(), children_cpu_s()
        command = [sys.executable, "-m", "bascule", "run", "runs/demo.toml", "--out", out]
        subprocess.run(command, check=True)
        whole = time.time() - begun
        spent = booked(Path(out) / "demo")
        spent["start and end of processes"] = whole - sum(spent.values())
        return shown(spent, whole, children_cpu_s() - before)


def booked(run: Path) -> dict[str, float]:
    """Seconds by what they were spent on."""
    spent: dict[str, float] = defaultdict(float)
    last: float | None = None
    for line in (run / "ledger.jsonl").read_text().splitlines():
        record = json.loads(line)
        now, kind = record["time_s"], record["kind"]
        if last is not None and kind != "run_resumed":  # what lies before a resume is nobody's
            name = f"train: {record['phase']}" if kind == "step_stats" else SHOWN.get(kind, kind)
            spent[name] += max(0.0, now - last)
        last = now if last is None else max(last, now)
    return spent


def shown(spent: dict[str, float], whole_s: float, cpu_s: float | None) -> int:
    for name, seconds in sorted(spent.items(), key=lambda one: -one[1]):
        if seconds >= 0.1:
            print(f"{seconds:8.1f} s  {seconds / whole_s:5.1%}  {name.replace('_', ' ')}")
    cpu = "" if cpu_s is None else f", {cpu_s:.0f} CPU-s"
    print(f"{whole_s:8.1f} s  whole run{cpu} (budget {BUDGET_S:.0f} s on 2 idle cores)")
    return 0 if whole_s <= BUDGET_S else 1


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    raise SystemExit(main())
