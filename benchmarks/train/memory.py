"""Peak memory of training against what `bascule plan` predicts, on the CPU.

    python benchmarks/train/memory.py [--recipes runs/demo.toml,runs/mini.toml] [--set KEY=VALUE]...

For each recipe a fresh process builds the model and the optimizer, takes two steps of each phase's largest batch as the plan counts it, without a
guard and without snapshots, and tells its peak resident set (VmHWM). `mini` is asked for fewer and shorter rows, so that it fits beside
other work. runs/distill.toml wants --set model.from=FILE. The bar: within 10 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bascule.config.load import load_recipe
from bascule.config.recipe import Recipe
from bascule.plan.options import price_pools
from bascule.stages import material, origin

BAR = 0.10
SMALLER = {
    "mini": [
        "model.max_position_embeddings=256", "sft.batch_sequences=2", "grpo.prompts=1", "grpo.group_size=2",
        "grpo.updates_per_rollout=1", "grpo.max_completion_tokens=64", "pretrain.batch_sequences=2", "pretrain.sequence_length=255",
        "sft.pack_tokens=256", 'train.phases=["sft","grpo"]',
    ]
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", default="runs/demo.toml,runs/mini.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(prepared(Path(options.measure), options.set)))
        return 0
    off = []
    for path in map(Path, options.recipes.split(",")):
        recipe = prepared(path, options.set)
        priced = price_pools(recipe, {}, lengths=material.lengths(recipe))[-1]
        command = [sys.executable, __file__, "--measure", str(path), *(f"--set={one}" for one in options.set)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{path}: the measured process failed:\n{done.stderr[-2000:]}")
        peak = int(done.stdout.splitlines()[-1])
        off.append(priced.memory_bytes / peak - 1.0)
        parts = {name: f"{value / 2**20:,.0f}" for name, value in priced.memory_components_bytes.items()}  # fmt: skip
        print(f"{path}: predicted {priced.memory_bytes / 2**20:,.0f} MiB, measured {peak / 2**20:,.0f}: {off[-1]:+.1%} (bar {BAR:.0%})")  # fmt: skip
        print(f"  predicted parts in MiB: {json.dumps(parts)}", flush=True)
    return 0 if all(abs(one) <= BAR for one in off) else 1


def prepared(path: Path, settings: Sequence[str]) -> Recipe:
    return origin.resolve(load_recipe(path, [*SMALLER.get(path.stem, []), *settings]))


def measure(recipe: Recipe) -> int:
    """Two steps of each phase's largest batch (plan.options.batches) without a guard, and the peak of both."""
    from bascule.accelerators.cpu import CpuAccelerator
    from bascule.model import existing, weights
    from bascule.model.transformer import Transformer
    from bascule.train.objective import Batch, collate, seated
    from bascule.train.sft import Sft
    from bascule.train.step import Stepper

    accelerator = CpuAccelerator()
    accelerator.prepare(recipe.threads)
    if recipe.model.from_:
        positions = recipe.model.max_position_embeddings
        model, _ = existing.load(Path(recipe.model.from_), positions=positions)
    else:
        model = Transformer(recipe.model)
        weights.initialise(model, 0)
    asked = recipe.train.precision
    stepper = Stepper(model, accelerator, precision="bf16" if asked == "bf16" else "fp32")
    stepper.begin(Sft(recipe.sft, [([0], [0])], seed=0, pad_id=0))
    accelerator.empty_cache()
    accelerator.reset_peak_memory()
    for groups in largest(recipe):
        rows = [(prompt, said) for prompt, completions in groups for said in completions]
        tensors = collate(rows, 0)
        tensors |= seated(groups, tensors["tokens"].shape[1])
        for _ in range(2):
            stepper.commit(stepper.propose(Batch("sft", stepper.step + 1, tensors)))
    peak = accelerator.memory().peak_bytes
    if peak is None:
        sys.exit("this system does not tell a process's peak memory")
    return peak


def largest(recipe: Recipe) -> list[list[tuple[list[int], list[list[int]]]]]:
    """By phase (prompt, completions) groups: SFT's rows of the longest worked solution looked at, GRPO's completions all at their cap;
    pretraining reads windows."""
    texts = material.lengths(recipe)

    def words(count: int) -> list[int]:
        return [1 + n % (recipe.model.vocab_size - 1) for n in range(count)]

    found = []
    for phase in recipe.phase_steps():
        if phase == "pretrain":
            found.append([(words(1), [words(recipe.pretrain.sequence_length)])] * recipe.pretrain.batch_sequences)  # fmt: skip
        elif phase == "sft":
            long, prompt = recipe.sft.pack_tokens or texts.worked_longest, round(texts.prompt)
            found.append([(words(prompt), [words(long - prompt)])] * recipe.sft.batch_sequences)
        else:
            grpo = recipe.grpo
            said = [words(grpo.max_completion_tokens)] * grpo.group_size
            found.append([(words(texts.prompt_longest), said)] * (grpo.prompts // grpo.updates_per_rollout))  # fmt: skip
    return found


if __name__ == "__main__":
    raise SystemExit(main())
