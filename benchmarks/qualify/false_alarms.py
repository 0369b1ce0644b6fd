"""Does the qualification cry wolf? Clean batteries on the CPU over seeds, types, models and shapes: the bar is 0 alarms in 200.

    python benchmarks/qualify/false_alarms.py                      200 batteries: some 40 core-minutes (12 CPU-seconds each); goes on where it was stopped
    python benchmarks/qualify/false_alarms.py --count 20 --opinfo  some, and PyTorch's operator samples, CPU against CPU

Each battery is the quick one, in this process, on a workload of its own: battery n has seed n, and type, model, rows and tokens in turn (so
that odd batches and lengths meet every type). Left out: speed.step, which decides nothing, and links.collectives but in every tenth, because
it starts processes. An alarm is any finding or error; a question left open ("too few runs") is no alarm and is counted apart. One JSON line a
battery goes to --results; a battery that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.qualify import examine
from bascule.qualify.check import CHECKS, Ask, asks
from bascule.qualify.workload import Workload
from bascule.records import Evidence

# 3 types, 4 models and 5 shapes share no factor, so 60 batteries meet every combination once.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODELS = (
    ModelConfig(preset="nano"),
    ModelConfig(preset="tick"),
    ModelConfig(preset="nano", attention="gqa", ffn="swiglu", qk_norm=True, num_key_value_heads=2, tie_word_embeddings=False),
    ModelConfig(preset="nano", attention="gqa", ffn="swiglu", num_key_value_heads=1),
)  # fmt: skip
SHAPES_BT = ((8, 48), (3, 37), (1, 64), (5, 17), (13, 29))
LEFT_OUT = ("speed.step", "links.collectives")


def main() -> None:
    arguments = _arguments()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    done = {line["battery"]: line for line in _lines(arguments.results)}
    with arguments.results.open("a", encoding="utf-8") as out:
        out.write("\n" if _torn(arguments.results) else "")
        for number in range(arguments.first, arguments.count):
            if number in done:
                continue
            done[number] = _battery(number)
            out.write(json.dumps(done[number]) + "\n")
            out.flush()
            for alarm in done[number]["alarms"]:
                print(f"battery {number} ({done[number]['what']}): {alarm}", flush=True)
    _summary([line for number, line in done.items() if number < arguments.count])
    if arguments.opinfo:
        _opinfo()


def _battery(number: int) -> dict[str, Any]:
    dtype = DTYPES[number % len(DTYPES)]
    model = MODELS[number % len(MODELS)]
    rows, tokens = SHAPES_BT[number % len(SHAPES_BT)]
    accelerator = open_accelerator("cpu")
    accelerator.prepare(1)
    started_s, said = time.process_time(), list[Evidence]()
    with tempfile.TemporaryDirectory() as folder:
        context = examine.open_context(accelerator, model, quick=True, seed=number, dtype=dtype, workdir=Path(folder))  # fmt: skip
        context.workload = Workload(model, number, dtype, rows=rows, tokens=tokens)
        for ask in asks(quick=True):
            if ask.check.name not in LEFT_OUT or (ask.check.family == "links" and number % 10 == 0):
                said += examine.put(context, ask)
    return {
        "battery": number,
        "what": f"seed {number}, {str(dtype).removeprefix('torch.')}, {model.preset} {model.attention} {model.ffn}, {rows}x{tokens}",
        "alarms": [f"{one.check}[{one.roles[0]}]: {one.detail}" for one in said if one.outcome in ("fail", "error")],
        "open": [f"{one.check}: {one.detail}" for one in said if one.outcome == "skipped"],
        "asked": len(said),
        "cpu_s": round(time.process_time() - started_s, 1),
    }  # fmt: skip


def _summary(lines: list[dict[str, Any]]) -> None:
    alarms = [(line["what"], alarm) for line in lines for alarm in line["alarms"]]
    cost = sum(line["cpu_s"] for line in lines)
    print(f"{len(alarms)} false alarms in {len(lines)} clean batteries ({sum(line['asked'] for line in lines)} answers, {cost / 60:.0f} core-minutes).")  # fmt: skip
    for what, alarm in alarms:
        print(f"- {what}: {alarm}")
    left_open = Counter(one for line in lines for one in line["open"])
    for words, count in left_open.most_common(10):
        print(f"- open in {count}: {words}")


def _opinfo() -> None:
    """PyTorch's own samples in fp32 and bf16, CPU against CPU."""
    accelerator = open_accelerator("cpu")
    accelerator.prepare(1)
    check = next(check for check in CHECKS if check.name == "conformity.opinfo")
    with tempfile.TemporaryDirectory() as folder:
        context = examine.open_context(accelerator, MODELS[0], quick=False, seed=0, workdir=Path(folder))  # fmt: skip
        for one in examine.put(context, Ask(check, "train")):
            print(f"\nOpInfo, CPU against CPU: {one.outcome}: {one.detail}")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines only: the last may be torn."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _torn(path: Path) -> bool:
    return path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument(
        "--first", type=int, default=0, help="begin with this battery (to share the work)"
    )
    parser.add_argument("--results", type=Path, default=Path("out/false_alarms.jsonl"))
    parser.add_argument("--opinfo", action="store_true", help="PyTorch's operator samples as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
