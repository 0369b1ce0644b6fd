"""Is the guilty rank named, and no innocent one? Real ranks over gloo, one of which goes wrong; watchdog, dumps, `blame`.

    python benchmarks/guard/ranks.py [--ranks 4] [--steps 2,5] [--out out/ranks.jsonl]

Every rank trains a small model for some steps as data-parallel loops do: two all-reduces of gradients and one all-gather a step,
and a heartbeat. In each drill one rank, in turn every one of them, does one of these at a step:

    hang         stands still between two collectives          death          is killed (SIGKILL)
    hang inside  stands still in the middle of a step          skipped        leaves one all-reduce out and goes on
    mismatched   issues an all-gather where its peers reduce   other size     reduces a tensor of another size
    clean        nothing (one drill a step): nobody may be named

The supervisor knows only heartbeats, exit codes (gloo ends a process whose sums do not fit) and the Flight Recorder's dumps, which each rank writes when it is asked to or when
a collective fails. Seen is the time from the fault to the watchdog's word.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import campaign

from bascule.config.environment import set_environment_default
from bascule.guard import watchdog
from bascule.guard.blame import blame
from bascule.guard.watchdog import Watchdog

KINDS = ("hang", "hang inside", "death", "skipped", "mismatched", "other size")
STEPS = 8
SILENT_S = 3.0
"""On a loaded box: steps take milliseconds, so this is a thousand of them."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", default="2,5")
    parser.add_argument("--out", type=Path, default=Path("out/ranks.jsonl"))
    options = parser.parse_args()
    set_environment_default("TORCH_FR_BUFFER_SIZE", "500")
    import torch.distributed  # noqa: F401  (before the fork: four ranks share one import)

    cells: list[dict[str, Any]] = []
    for step in (int(word) for word in options.steps.split(",")):
        cells.append({"ranks": options.ranks, "kind": "clean", "step": step, "guilty": None})
        cells += [
            {"ranks": options.ranks, "kind": kind, "step": step, "guilty": guilty}
            for kind in KINDS
            for guilty in range(options.ranks)
        ]
    report(campaign.carry_out(cells, options.out, one_drill))


def one_drill(cell: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bascule-ranks-") as room:
        folder = Path(room)
        (folder / "dumps").mkdir()
        fork = multiprocessing.get_context("fork")
        ranks = [
            fork.Process(target=rank, args=(number, cell, port, folder), daemon=True)
            for number in range(cell["ranks"])
        ]
        for one in ranks:
            one.start()
        try:
            silent, dead = supervise(ranks, folder)
            if silent is None:
                return {"named": [], "reason": "all ranks finished", "seen_s": None}
            began = folder / "began"
            seen_s = time.time() - float(began.read_text()) if began.exists() else None
            (folder / "dump").touch()
            for one in ranks:
                one.join(timeout=20)
            told = blame(folder / "dumps", died_first=dead)
            return {"named": list(told.guilty_ranks), "reason": told.reason, "confidence": told.confidence, "first": silent, "seen_s": seen_s}  # fmt: skip
        finally:
            for one in ranks:
                one.kill()
                one.join()


def supervise(ranks: list[Any], folder: Path) -> tuple[str | None, int | None]:
    """Wait for the end of all, or for the first that dies, fails or falls silent: in words which, and the one that died while the
    others lived."""
    dogs = [
        Watchdog(folder / f"{number}.json", hang_timeout_s=SILENT_S, start_timeout_s=120)
        for number in range(len(ranks))
    ]
    while True:
        codes = [one.exitcode for one in ranks]
        if all(code == 0 for code in codes):
            return None, None
        if any(code not in (None, 0) for code in codes):
            dead = [number for number, code in enumerate(codes) if code is not None and code < 0]
            return f"exit codes {codes}", dead[0] if len(dead) == 1 else None
        for number, (one, dog) in enumerate(zip(ranks, dogs, strict=True)):
            if one.exitcode is None and (health := dog.judge(one.pid)).must_end:
                return f"rank {number}: {health.reason}", None
        time.sleep(0.05)


# ---- one rank


def rank(number: int, cell: dict[str, Any], port: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (gloo's peers all tell of the one that died)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    watchdog.beat(folder / f"{number}.json", 0, watchdog.STARTING)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=number, world_size=cell["ranks"]
    )

    once = threading.Lock()

    def dump() -> None:
        once.acquire()  # never given back: the process ends here
        temporary = folder / f"dump_{number}"
        temporary.write_bytes(torch._C._distributed_c10d._dump_fr_trace())
        temporary.rename(folder / "dumps" / f"rank_{number}")
        os._exit(1)

    def dump_when_asked() -> None:
        while not (folder / "dump").exists():
            time.sleep(0.02)
        dump()

    threading.Thread(target=dump_when_asked, daemon=True).start()
    try:
        for step in range(1, STEPS + 1):
            strikes = number == cell["guilty"] and step == cell["step"]
            one_step(step, cell["kind"] if strikes else "clean", folder)
            watchdog.beat(folder / f"{number}.json", step, "train")
        dist.barrier()
    except RuntimeError:
        dump()
    os._exit(0)


def one_step(step: int, fault: str, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()
    if fault != "clean":
        (folder / "began").write_text(str(time.time()))
    if fault == "hang":
        time.sleep(600)
    if fault == "death":
        os.kill(os.getpid(), signal.SIGKILL)
    large, small = torch.full((64,), float(step)), torch.full((16,), float(step))
    if fault == "mismatched":
        dist.all_gather([torch.empty(64) for _ in range(world)], large)
    elif fault == "other size":
        dist.all_reduce(torch.ones(48))
    elif fault != "skipped":
        dist.all_reduce(large)
    if fault == "hang inside":
        time.sleep(600)
    dist.all_reduce(small)
    dist.all_gather([torch.empty(4) for _ in range(world)], torch.ones(4))


def report(results: list[dict[str, Any]]) -> None:
    wanted = [[] if one["cell"]["guilty"] is None else [one["cell"]["guilty"]] for one in results]
    for kind in ("clean", *KINDS):
        rows = [pair for pair in zip(results, wanted, strict=True) if pair[0]["cell"]["kind"] == kind]  # fmt: skip
        right = sum(one["named"] == who for one, who in rows)
        innocent = sum(bool(set(one["named"]) - set(who)) for one, who in rows)
        seen = [one["seen_s"] for one, _ in rows if one["seen_s"] is not None]
        slowest = f", seen after at most {max(seen):.1f} s" if seen else ""
        reasons = dict(Counter(one["reason"] for one, _ in rows))
        print(f"{kind:12} named right {right} of {len(rows)}, an innocent rank {innocent} times{slowest}; {reasons}")  # fmt: skip
    right = sum(one["named"] == who for one, who in zip(results, wanted, strict=True))
    print(f"\nin all {campaign.said(right, len(results))}")


if __name__ == "__main__":
    main()
