"""SIGKILL at random moments: does a run that goes on end with the bits of one that nobody disturbed?

    python benchmarks/guard/kills.py [--kills 200] [--out out/kills.jsonl]

Each run is runs/tiny.toml, shortened, whose preferred chip begins to corrupt steps (so that it migrates), and is killed several
times; what is killed: the supervisor, the trainer, the rollout process, the trainer while it writes a snapshot, the supervisor
while a migration is being recorded. A killed supervisor's command is given again. A moment is a number of ledger lines plus up to
half a second, so that a loaded machine meets the same moments. Lost is: another hash of the final weights, an exit code other
than 0, or a step that was skipped. The bits to equal are those of the same recipe on a sound chip, not killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import campaign
import numpy as np

from bascule.ledger import of_kind, read_ledger
from bascule.records import Migration, RunFinished, Warned

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("supervisor", "trainer", "rollout", "snapshot write", "migration")
KILLS_A_RUN = 4
LINES = (
    90  # what an undisturbed run writes, roughly; later moments than its end fall back to its end
)
FAULTY = "sim:ascend-r2?onset_step=9@cpu"
PATIENCE_S = 3600.0  # on a machine that runs others first
SHORT = [
    "qualify.required=false", "qualify.time_limit_s=0.1", "data.train_problems=64", "data.eval_problems=4", "evaluate.samples=2",
    "sft.steps=15", "grpo.steps=6", "train.snapshot_every_steps=4",
    "guard.hang_timeout_s=1200", "guard.start_timeout_s=1200",  # nothing hangs here; a machine that runs others first may seem to
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("out/kills.jsonl"))
    options = parser.parse_args()
    undisturbed = {"seed": "undisturbed"}
    cells = [{"seed": seed} for seed in range(-(-options.kills // KILLS_A_RUN))]
    first, *results = campaign.carry_out([undisturbed, *cells], options.out, one_run)
    report(first["weights"], results)


def one_run(cell: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bascule-kills-") as room:
        if cell["seed"] == "undisturbed":
            return finish(Run(Path(room), accelerator="cpu"), [])
        rng = np.random.default_rng(cell["seed"])
        moments = sorted(rng.integers(2, LINES, size=KILLS_A_RUN).tolist())
        run = Run(Path(room), accelerator=FAULTY)
        struck = []
        for lines in moments:
            target = TARGETS[int(rng.integers(len(TARGETS)))]
            run.wait_until(lambda lines=lines: run.lines() >= lines)  # type: ignore[misc]
            if run.over():
                break
            hit = run.kill(target, delay_s=float(rng.uniform(0.0, 0.5)))
            if hit:
                struck.append((lines, hit))
        return finish(run, struck)


class Run:
    """One `bascule run` and its workers, found by the run folder in their command lines: no other process is ever touched."""

    def __init__(self, out: Path, *, accelerator: str) -> None:
        self.out = out
        self.folder = out / "tiny"
        settings = [*SHORT, f"pools.ascend.accelerator={accelerator}"]
        self.command = [
            sys.executable, "-m", "bascule.cli", "run", str(ROOT / "runs" / "tiny.toml"), "--out", str(out), "--json",
            *(word for setting in settings for word in ("--set", setting)),
        ]  # fmt: skip
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self.out / "supervisor.log", "ab") as log:
            return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=log)

    def lines(self) -> int:
        ledger = self.folder / "ledger.jsonl"
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    def over(self) -> bool:
        return self.process.poll() is not None

    def wait_until(
        self, ready: Callable[[], bool], *, every_s: float = 0.02, patience_s: float = PATIENCE_S
    ) -> bool:
        deadline = time.monotonic() + patience_s
        while not self.over() and time.monotonic() < deadline:
            if ready():
                return True
            time.sleep(every_s)
        return False

    def kill(self, target: str, *, delay_s: float) -> str | None:
        """Strike, and give the command again if it was the supervisor. What was struck: None when the run was over first."""
        if target == "snapshot write":
            writing = self.wait_until(
                lambda: any((self.folder / "snapshots").glob(".step-*.tmp-*")), every_s=0.0005
            )
            return target if writing and self._kill_worker("trainer") else None
        if target in ("trainer", "rollout"):
            time.sleep(delay_s)
            return target if self.wait_until(lambda: self._kill_worker(target)) else None
        if target == "migration" and not self.wait_until(
            self._migrating, every_s=0.001, patience_s=20.0
        ):
            target = "supervisor"  # this run has migrated already
        if self.over():
            return None
        self.process.kill()
        self.process.wait()
        self.process = self._start()
        return target

    def _migrating(self) -> bool:
        """Between an incident that asks for a rollback and the migration that answers it."""
        lines = (self.folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
        asked = sum('"rollback":true' in line for line in lines)
        return asked > sum('"kind":"migration"' in line for line in lines)

    def _kill_worker(self, kind: str) -> bool:
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if kind in words and str(self.folder) in words:
                os.kill(int(entry.name), signal.SIGKILL)
                return True
        return False


def finish(run: Run, struck: list[tuple[int, str]]) -> dict[str, Any]:
    code = run.process.wait(timeout=PATIENCE_S)
    records = read_ledger(run.folder / "ledger.jsonl")
    ended = of_kind(records, RunFinished)
    moves = of_kind(records, Migration)
    return {
        "struck": struck,
        "exit_code": code,
        "weights": ended[-1].final_weights_sha256 if ended else None,
        "skipped": [one.detail for one in of_kind(records, Warned) if one.what == "batch skipped"],
        "recomputed": [one.steps_recomputed for one in moves],
        "log": "" if code == 0 else (run.out / "supervisor.log").read_text()[-2000:],
    }


def report(right: str, results: list[dict[str, Any]]) -> None:
    hits = [target for one in results for _, target in one["struck"]]
    lost = [
        one for one in results if one["exit_code"] != 0 or one["weights"] != right or one["skipped"]
    ]
    counted = ", ".join(f"{count} {target}" for target, count in Counter(hits).most_common())
    recomputed = [steps for one in results for steps in one["recomputed"]]
    print(f"{len(hits)} SIGKILLs in {len(results)} runs: {counted}")
    print(f"steps computed again after a rollback: at most {max(recomputed, default=0)}")
    print(f"runs that lost something: {len(lost)}; kept: {campaign.said(len(results) - len(lost), len(results))}")  # fmt: skip
    for one in lost:
        print(json.dumps(one))


if __name__ == "__main__":
    main()
