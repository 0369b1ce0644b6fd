"""Peak memory of training against what `bascule plan` predicts, on the CPU.

    python benchmarks/train/memory.py [--recipes runs/demo.toml,runs/mini.toml]

For each recipe a fresh process builds the model, the optimizer and the largest batch that the plan counts (its rows at its full length), takes
two steps without a guard and tells its peak resident set (VmHWM). `mini` is asked with 2 rows of 256 positions, so that it fits
beside other work. The bar: within 10 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bascule.config.load import load_recipe
from bascule.config.recipe import Recipe
from bascule.plan.options import largest_batch, price_pools

BAR = 0.10
SMALLER = {
    "mini": [
        "model.max_position_embeddings=256", "sft.batch_sequences=2", "grpo.prompts=1", "grpo.group_size=2",
        "grpo.updates_per_rollout=1", "grpo.max_completion_tokens=64", "pretrain.batch_sequences=2", "pretrain.sequence_length=255",
    ]
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", default="runs/demo.toml,runs/mini.toml")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(prepared(Path(options.measure))))
        return 0
    off = []
    for path in map(Path, options.recipes.split(",")):
        priced = price_pools(prepared(path), {})[-1]
        command = [sys.executable, __file__, "--measure", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{path}: the measured process failed:\n{done.stderr[-2000:]}")
        peak = int(done.stdout.splitlines()[-1])
        off.append(priced.memory_bytes / peak - 1.0)
        parts = {name: f"{value / 2**20:,.0f}" for name, value in priced.memory_components_bytes.items()}  # fmt: skip
        print(f"{path}: predicted {priced.memory_bytes / 2**20:,.0f} MiB, measured {peak / 2**20:,.0f}: {off[-1]:+.1%} (bar {BAR:.0%})")  # fmt: skip
        print(f"  predicted parts in MiB: {json.dumps(parts)}", flush=True)
    return 0 if all(abs(one) <= BAR for one in off) else 1


def prepared(path: Path) -> Recipe:
    return load_recipe(path, SMALLER.get(path.stem, []))


def measure(recipe: Recipe) -> int:
    import torch

    from bascule.accelerators.cpu import CpuAccelerator
    from bascule.model import weights
    from bascule.model.transformer import Transformer
    from bascule.train.objective import Batch
    from bascule.train.sft import Sft
    from bascule.train.step import Stepper

    accelerator = CpuAccelerator()
    accelerator.prepare(recipe.threads)
    model = Transformer(recipe.model)
    weights.initialise(model, 0)
    stepper = Stepper(model, accelerator)
    stepper.begin(Sft(recipe.sft, [([0], [0])], seed=0, pad_id=0))
    shape = (largest_batch(recipe), recipe.model.max_position_embeddings)
    tokens = torch.arange(shape[0] * shape[1]).view(shape) % recipe.model.vocab_size
    real = torch.ones(shape, dtype=torch.bool)
    for step in (1, 2):
        tensors = {"tokens": tokens, "targets": tokens, "real": real, "mask": real.float()}
        stepper.commit(stepper.propose(Batch("sft", step, tensors)))
    peak = accelerator.memory().peak_bytes
    if peak is None:
        sys.exit("this system does not tell a process's peak memory")
    return peak


if __name__ == "__main__":
    raise SystemExit(main())
