"""Tokens a second, share of the peak (MFU) and peak memory of the training step on one chip, operator by operator and played back.

    python benchmarks/train/throughput.py --chip cuda [--shapes sft,moe,dense,rl] [--precision bf16] [--seconds 20]
    python benchmarks/train/throughput.py --chip cpu --shapes nano

Correctness first: loss and gradient norm of one short row on this chip must be the CPU's in fp32 (within 2e-2 in bf16, 1e-3 in fp32); a chip
that is off is not timed. Then each shape is trained for `--seconds` as it is, and as long with the step recorded where the chip plays recordings.

    MFU = tokens/s x FLOPs a token / peak          FLOPs a token = 3 x (2 x weights that speak + attention over half the row)

Recomputation is not counted. The peak is the datasheet's, dense, of the products' type; where the chip has no row in bascule/plan/data/chips.csv, that of the
best product of 4,096 rows seen here, and the line says so. Tokens a second are the figure that counts. `dense` has the FLOPs a token of `moe`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bascule.accelerators.base import Accelerator
from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.config.training import GrpoConfig, Precision, SftConfig
from bascule.errors import RecipeError
from bascule.model import count, weights
from bascule.model.transformer import Transformer
from bascule.plan.catalogue import chip_like
from bascule.records import RolloutReply
from bascule.train.grpo import Grpo
from bascule.train.objective import Batch, Objective, collate
from bascule.train.recorded import RECORD_AFTER, TRIALS, RecordedSteps
from bascule.train.sft import Sft
from bascule.train.step import Stepper

QWEN3_600M: dict[str, Any] = dict(
    attention="gqa", ffn="swiglu", vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, intermediate_size=3072, qk_norm=True, rope_theta=1e6, max_position_embeddings=16384,
)  # fmt: skip
BODY: dict[str, Any] = dict(
    vocab_size=32768, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, head_dim=64, v_head_dim=64,
    qk_nope_head_dim=32, qk_rope_head_dim=32, kv_lora_rank=256, max_position_embeddings=2048,
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """`asked`: tokens a second, or MFU below 1, on one H100 (issue part 4)."""

    model: dict[str, Any]
    phase: Literal["sft", "grpo"]
    rows: int
    tokens: int
    asked: float | None = None


SHAPES = {
    "sft": Shape(QWEN3_600M, "sft", 2, 8192, 30_000),
    "moe": Shape({**BODY, "intermediate_size": 2048, "moe_intermediate_size": 512, "n_routed_experts": 20, "num_experts_per_tok": 3}, "sft", 32, 2048, 0.30),
    "dense": Shape({**BODY, "ffn": "swiglu", "intermediate_size": 2048}, "sft", 32, 2048),
    "rl": Shape(QWEN3_600M, "grpo", 1, 16384, 15_000),
    "nano": Shape({"preset": "nano"}, "sft", 64, 48),
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    shape: str
    how: str
    tokens_per_s: float
    step_s: float
    mfu: float
    peak_gib: float | None
    steps: int


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", default="cuda")
    parser.add_argument("--shapes", default="sft,moe,dense,rl")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=None, help="default: bf16; fp32 on a CPU")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    chip = open_accelerator(options.chip)
    chip.prepare(options.threads)
    precision: Precision = options.precision or ("fp32" if chip.device.type == "cpu" else "bf16")
    peak, source = peak_flops(chip, precision)
    date = datetime.datetime.now(datetime.UTC).date()
    print(f"{chip.info().name}, {chip.info().driver}, {date}; products in {precision}; peak {peak / 1e12:.3g} TFLOP/s ({source})")  # fmt: skip
    figures, wrong = [], []
    for name in options.shapes.split(","):
        if name not in SHAPES:
            sys.exit(f"--shapes: '{name}' is not known; allowed: {', '.join(SHAPES)}")
        if off := disagreement(name, chip, precision):
            wrong.append(name)
            print(f"{name}: WRONG, not timed: {off}")
            continue
        for found in timed(name, chip, precision, peak, options.seconds):
            figures.append(found)
            print(told(found), flush=True)
    if options.json:
        rows = [asdict(one) for one in figures]
        options.json.write_text(json.dumps({"chip": chip.info().name, "date": str(date), "precision": precision, "rows": rows, "wrong": wrong}))  # fmt: skip
    return 1 if wrong else 0


def told(one: Figures) -> str:
    asked = SHAPES[one.shape].asked
    bar = "" if asked is None else f"; asked of an H100: {f'{asked:,.0f} tokens/s' if asked > 1 else f'{asked:.0%} MFU'}"  # fmt: skip
    memory = "" if one.peak_gib is None else f", peak {one.peak_gib:.1f} GiB"
    return f"{one.shape}, {one.how}: {one.tokens_per_s:,.0f} tokens/s, {one.step_s * 1e3:,.1f} ms a step, {one.mfu:.1%} MFU{memory}, {one.steps} steps{bar}"


def config_of(name: str, tokens: int) -> ModelConfig:
    config = ModelConfig(**SHAPES[name].model)
    return config.model_copy(update={"max_position_embeddings": max(tokens, config.max_position_embeddings)})  # fmt: skip


def built(name: str, tokens: int, chip: Accelerator, precision: Precision, recorded: RecordedSteps | None = None) -> Stepper:  # fmt: skip
    model = Transformer(config_of(name, tokens))
    weights.initialise(model, 0)
    stepper = Stepper(chip.move(model), chip, router_bias_speed=1e-3, precision=precision, recorded=recorded)  # fmt: skip
    stepper.begin(objective_of(name, stepper))
    return stepper


def objective_of(name: str, stepper: Stepper) -> Objective:
    if SHAPES[name].phase == "sft":
        return Sft(SftConfig(steps=1_000_000, muon_learning_rate=0.0), [([0], [0])], seed=0, pad_id=0)  # fmt: skip

    def never(_: Any) -> RolloutReply:
        raise AssertionError("no rollout is asked here")

    return Grpo(
        GrpoConfig(steps=1_000_000), [[0]], seed=0, pad_id=0, sampler=never, score=stepper.score, reward=lambda owners, said: [0.0] * len(said)
    )  # fmt: skip


def batch_of(name: str, rows: int, tokens: int, step: int) -> Batch:
    """Whole rows of made tokens, an eighth of each a prompt; GRPO's advantages are of both signs."""
    vocabulary = config_of(name, tokens).vocab_size
    ids = torch.randint(1, vocabulary, (rows, tokens + 1), generator=torch.Generator().manual_seed(0)).tolist()  # fmt: skip
    tensors = collate([(row[: tokens // 8], row[tokens // 8 :]) for row in ids], 0)
    if SHAPES[name].phase == "grpo":
        tensors["advantages"] = torch.tensor([(-1.0) ** row for row in range(rows)])
        tensors["rollout_logprobs"] = torch.full_like(tensors["mask"], -11.0) * tensors["mask"]
        tensors["counted"] = tensors["mask"].flatten().nonzero()[:, 0]
    return Batch(SHAPES[name].phase, step, tensors)


def disagreement(name: str, chip: Accelerator, precision: Precision) -> str:
    """What is off in a short step beside the CPU's in fp32; empty where nothing is."""
    tokens, allowed = min(SHAPES[name].tokens, 256), 2e-2 if precision == "bf16" else 1e-3

    def found(where: Accelerator, how: Precision) -> tuple[float, float]:
        made = built(name, tokens, where, how).propose(batch_of(name, 1, tokens, 1))
        return made.loss, made.grad_norm

    mine, right = found(chip, precision), found(open_accelerator("cpu"), "fp32")
    for what, one, other in zip(("loss", "gradient norm"), mine, right, strict=True):
        if not abs(one - other) <= allowed * abs(other):
            return f"{what} {one:.6g} where the CPU has {other:.6g} (allowed {allowed:g} of it)"
    return ""


def timed(name: str, chip: Accelerator, precision: Precision, peak: float, seconds: float) -> list[Figures]:  # fmt: skip
    found = [run(name, chip, precision, peak, seconds, None)]
    record = chip.recorder("train")
    if record is None:
        print(f"{name}: this chip plays no recordings")
        return found
    troubles: list[str] = []
    recorded = RecordedSteps(chip, record, tell=str, warn=troubles.append)
    again = run(name, chip, precision, peak, seconds, recorded)
    if troubles:
        print(f"{name}: {troubles[0]}")
        return found
    return [*found, again]


def run(
    name: str, chip: Accelerator, precision: Precision, peak: float, seconds: float, recorded: RecordedSteps | None
) -> Figures:  # fmt: skip
    """Whole steps, update included, timed between two waits for the chip."""
    shape = SHAPES[name]
    chip.empty_cache()
    chip.reset_peak_memory()
    stepper = built(name, shape.tokens, chip, precision, recorded)
    batch = batch_of(name, shape.rows, shape.tokens, 1)

    def step() -> None:
        stepper.commit(stepper.propose(Batch(batch.phase, stepper.step + 1, batch.tensors)))

    for _ in range(3 if recorded is None else RECORD_AFTER + TRIALS + 2):
        step()
    steps, elapsed = repeated(step, chip, seconds)
    tokens_per_s = steps * shape.rows * shape.tokens / elapsed
    flops = count.train_flops_per_token(config_of(name, shape.tokens), shape.tokens)
    use = chip.memory().peak_bytes
    how = "operator by operator" if recorded is None else "played back"
    return Figures(name, how, tokens_per_s, elapsed / steps, tokens_per_s * flops / peak, use and use / 2**30, steps)  # fmt: skip


def repeated(step: Callable[[], None], chip: Accelerator, seconds: float) -> tuple[int, float]:
    chip.synchronize()
    begin, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - begin < seconds:
        step()
        steps += 1
    chip.synchronize()
    return steps, time.perf_counter() - begin


def peak_flops(chip: Accelerator, precision: Precision) -> tuple[float, str]:
    """FLOP/s, and where the figure is from."""
    if precision == "bf16":
        try:
            known = chip_like(chip.info().name, chip.info().vendor)
        except RecipeError:
            known = None
        if known is not None and known.basis != "stand-in" and (tflops := known.peak_tflops("bf16")):  # fmt: skip
            return tflops * 1e12, f"datasheet of {known.name}, dense"
    size, dtype = 4096, torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.ones(size, size, device=chip.device, dtype=dtype) for _ in range(2))
    seconds = min(chip.timed(lambda: one @ other)[1] for _ in range(4))
    return 2 * size**3 / seconds, f"the best of 4 products of {size} x {size} here"


if __name__ == "__main__":
    raise SystemExit(main())
