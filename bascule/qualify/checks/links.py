"""Do collectives between two processes return what was sent, to the last element?

Every rank's part is whole numbers, so each sum is exact in any order and the tolerance is zero (as nccl-tests does). Sizes are odd,
end in tails, and reach 1 MiB and (full battery) 1 GiB, where real all-reduces have lost their last eight values or one rank's part.
Sums in quick succession carry sequence numbers, so that an answer which belongs to an earlier question shows. The processes are our
own, started from here; where the machine has one chip of this kind only, one process asks what a group of one can be asked.

A rank that is not done in time hangs only if it stood still: no case finished and no processor time used for a while. One that is
merely slow (a busy machine) leaves the question open; it does not condemn the chip.

    python -m bascule.qualify.checks.links REQUEST.json RANK
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bascule.accelerators.base import Accelerator, Work
from bascule.accelerators.registry import open_accelerator
from bascule.errors import DeviceFault
from bascule.folder import write_json_atomic
from bascule.qualify.checks.exact import integers
from bascule.qualify.context import CheckContext, ChipFailed, Measured, describe
from bascule.records import Evidence

SIZES_QUICK = (1, 7, 257, 1000, 4097, 262_144)  # the last is 1 MiB of fp32
SIZES_FULL = (*SIZES_QUICK, 262_144 + 3, 16_777_216 + 5)
LARGEST = 268_435_456  # 1 GiB of fp32, full battery, one sum only
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
)
_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.uint8: 8}
EVERY_DTYPE_UP_TO = 10_000
IN_SUCCESSION = 16
LIMIT_S = 100.0  # on an idle machine it takes 3 s
STILL_S = 20.0
BANDWIDTH_ELEMENTS = 262_144


def collectives(context: CheckContext) -> list[Evidence]:
    ranks = _ranks(context.accelerator)
    reports, trouble, slow = _run_ranks(context, ranks)
    if trouble and slow:
        return [context.skipped(f"{trouble}, but was still computing: the machine is busy or slow")]
    if trouble:
        raise ChipFailed(trouble)
    wrong = [sentence for report in reports for sentence in report["wrong"]]
    measured: Measured = {
        "ranks": ranks,
        "cases": reports[0]["cases"],
        "wrong": len(wrong),
        "latency_s": reports[0]["latency_s"],
        "bandwidth_gb_per_s": reports[0]["bandwidth_gb_per_s"],
    }
    if wrong:
        return [context.failed(f"{wrong[0]} ({len(wrong)} cases wrong on {ranks} ranks)", measured)]
    return [
        context.passed(
            f"{reports[0]['cases']} collectives of {ranks} rank{'s' * (ranks > 1)} exact ({context.accelerator.collective_backend}, "
            f"{1e6 * reports[0]['latency_s']:.0f} us, {reports[0]['bandwidth_gb_per_s']:.2f} GB/s)",
            measured,
        )
    ]


def _ranks(accelerator: Accelerator) -> int:
    if accelerator.device.type == "cpu":
        return 2
    return min(2, torch.accelerator.device_count())


def _run_ranks(context: CheckContext, ranks: int) -> tuple[list[dict[str, Any]], str | None, bool]:
    """Start the ranks, wait for their reports. The second value says what went wrong instead, the third that it was only slow."""
    folder = context.workdir / "links"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    request = folder / "request.json"
    write_json_atomic(
        request,
        {
            "accelerator": context.accelerator.name,
            "ranks": ranks,
            "store": str(folder / "store"),
            "seed": context.seed,
            "quick": context.quick,
            "report": str(folder / "rank-"),
            "threads": torch.get_num_threads(),
        },
    )
    command = [sys.executable, "-m", "bascule.qualify.checks.links", str(request)]
    processes = []
    for rank in range(ranks):
        with open(folder / f"rank-{rank}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [*command, str(rank)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )
    trouble, slow = _wait(context, processes, LIMIT_S if context.quick else 10 * LIMIT_S)
    if trouble:
        return [], f"{trouble}; see {folder}/rank-*.log", slow
    reports = [
        json.loads(Path(f"{folder / 'rank-'}{rank}.json").read_text(encoding="utf-8"))
        for rank in range(ranks)
    ]
    raised = [report["raised"] for report in reports if report["raised"]]
    return reports, raised[0] if raised else None, False


def _wait(
    context: CheckContext, processes: list[subprocess.Popen[bytes]], limit_s: float
) -> tuple[str | None, bool]:
    """(what went wrong, it was only slow). Ends early when all ranks stand still, or when one died."""
    began_s = moved_s = time.monotonic()
    before = _spent_s(processes)
    trouble, slow = None, False
    while trouble is None and any(process.poll() is None for process in processes):
        time.sleep(0.05)
        now, spent_s = time.monotonic(), _spent_s(processes)
        if spent_s is None or before is None or spent_s - before > 0.02 * STILL_S:
            before, moved_s = spent_s, now
        context.progress(0, 1)
        codes = [process.poll() for process in processes]
        died = next((rank for rank, code in enumerate(codes) if code), None)
        if died is not None:
            trouble = f"rank {died} ended with code {codes[died]} in its collectives"
        elif now - began_s > limit_s or now - moved_s > STILL_S + limit_s / 10:
            rank = codes.index(None) if None in codes else 0
            slow = now - moved_s < STILL_S
            trouble = f"rank {rank} did not finish its collectives within {now - began_s:.0f} s"
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    return trouble, slow


def _spent_s(processes: list[subprocess.Popen[bytes]]) -> float | None:
    """Processor time of all ranks so far, in seconds; None where the system does not tell (no /proc), and then nothing stands still."""
    ticks = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


# --- in the rank's own process ---------------------------------------------------------------------------------------------


def _rank_main(request: dict[str, Any], rank: int) -> None:
    accelerator = open_accelerator(_name_of(request["accelerator"], rank), seed=request["seed"])
    accelerator.prepare(request["threads"])
    report: dict[str, Any] = {
        "wrong": [],
        "cases": 0,
        "raised": None,
        "latency_s": 0.0,
        "bandwidth_gb_per_s": 0.0,
    }
    dist.init_process_group(
        accelerator.collective_backend,
        init_method=f"file://{request['store']}",
        rank=rank,
        world_size=request["ranks"],
    )
    try:
        with accelerator.session(Work("train", 1)):
            _ask_all(accelerator, request, rank, report)
            accelerator.synchronize()
        dist.barrier()
    except (RuntimeError, DeviceFault) as error:
        report["raised"] = f"rank {rank}: {describe(error)}"
    write_json_atomic(Path(f"{request['report']}{rank}.json"), report)
    dist.destroy_process_group()


def _name_of(name: str, rank: int) -> str:
    """The rank's own chip: `cuda` is `cuda:1` for rank 1. Simulated chips and the CPU are shared."""
    return (
        name
        if rank == 0 or name.startswith("sim:") or name == "cpu" or ":" in name
        else f"{name}:{rank}"
    )


def _ask_all(
    accelerator: Accelerator, request: dict[str, Any], rank: int, report: dict[str, Any]
) -> None:
    ranks, seed = request["ranks"], request["seed"]
    for size in SIZES_QUICK if request["quick"] else SIZES_FULL:
        for dtype in DTYPES if size <= EVERY_DTYPE_UP_TO else DTYPES[:1]:
            # Whole numbers as large as the type holds exactly, so that a sum in fewer bits shows.
            high = 2 ** _BITS.get(dtype, 22) // ranks - (dtype == torch.uint8)
            low = 0 if dtype == torch.uint8 else -high
            parts = [
                integers(seed, f"link {other}", (size,), low, high).to(dtype)
                for other in range(ranks)
            ]
            mine = parts[rank].to(accelerator.device)
            for name, got, want in _cases(mine, parts, rank):
                short = str(dtype).removeprefix("torch.")
                _hold(report, f"{name} of {size} {short} values", got, want, rank)
    for number, (got, want) in enumerate(_in_succession(accelerator, ranks, rank)):
        _hold(report, f"sum number {number} of {IN_SUCCESSION} in succession", got, want, rank)
    if not request["quick"]:
        _ask_largest(accelerator, ranks, rank, report)
    _time(accelerator, report)


def _hold(report: dict[str, Any], what: str, got: Tensor, want: Tensor, rank: int) -> None:
    report["cases"] += 1
    differing = got.cpu() != want
    wrong = int(differing.sum())
    if wrong:
        at = int(differing.nonzero()[0])
        report["wrong"].append(f"{what}: {wrong} wrong on rank {rank}, first at {at}")


def _in_succession(accelerator: Accelerator, ranks: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Sums started one after another without waiting; each says which it is, and what all ranks put in comes out."""
    tensors = [
        torch.full((257,), float(number * ranks + rank), device=accelerator.device)
        for number in range(IN_SUCCESSION)
    ]
    for pending in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        pending.wait()
    everybody = sum(range(ranks))
    return [
        (tensor, torch.full((257,), float(number * ranks * ranks + everybody)))
        for number, tensor in enumerate(tensors)
    ]


def _ask_largest(accelerator: Accelerator, ranks: int, rank: int, report: dict[str, Any]) -> None:
    """1 GiB in one sum, in place; a pattern that needs no second copy to check against."""
    summed = (
        torch.arange(LARGEST, dtype=torch.int32, device=accelerator.device).remainder_(251).float()
    )
    summed += rank
    dist.all_reduce(summed)
    step = 2**24
    for start in range(0, LARGEST, step):
        want = torch.arange(start, start + step, dtype=torch.int32).remainder_(251).float() * ranks
        _hold(
            report,
            f"sum of 1 GiB, from {start}",
            summed[start : start + step],
            want + sum(range(ranks)),
            rank,
        )


def _cases(mine: Tensor, parts: list[Tensor], rank: int) -> list[tuple[str, Tensor, Tensor]]:
    total = torch.stack(parts).sum(0).to(mine.dtype)
    summed, highest, sent = mine.clone(), mine.clone(), mine.clone()
    dist.all_reduce(summed)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    dist.broadcast(sent, src=len(parts) - 1)
    gathered = [torch.empty_like(mine) for _ in parts]
    dist.all_gather(gathered, mine)
    return [
        ("sum over all ranks", summed, total),
        ("maximum over all ranks", highest, torch.stack(parts).max(0).values),
        ("broadcast", sent, parts[-1]),
        ("gather from all ranks", torch.cat(gathered), torch.cat(parts)),
    ]


def _time(accelerator: Accelerator, report: dict[str, Any]) -> None:
    one = torch.zeros(1, device=accelerator.device)
    many = torch.zeros(BANDWIDTH_ELEMENTS, device=accelerator.device)
    for tensor in (one, many):
        dist.all_reduce(tensor)
    report["latency_s"] = min(accelerator.timed(lambda: dist.all_reduce(one))[1] for _ in range(10))
    seconds = min(accelerator.timed(lambda: dist.all_reduce(many))[1] for _ in range(3))
    report["bandwidth_gb_per_s"] = many.numel() * many.element_size() / seconds / 1e9


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as request_file:
        _rank_main(json.load(request_file), int(sys.argv[2]))
