"""Our training step against transformers' Trainer: same weights, same batches, same optimizer, in one run.

    python benchmarks/train/vs_transformers.py [--models nano,demo,moe,dense] [--threads 2] [--steps 20]

First both train from the same weights on the same batches and must show the same losses (relative difference below 1e-3 at every
step). Only then are they timed, in turn, `--rounds` times; each keeps its best round. Theirs runs as a user would run it at its
best: fused AdamW, no logging, no saving, and for experts every implementation transformers has on this machine, the fastest
counted. `demo` is nano on the demo's own SFT batches, padded to their longest row, with a loss on completions only; theirs goes without an
attention mask there, which right-padded rows do not need. Tokens that are padding are not counted, for either. Ours runs without a guard, as theirs does. Tokens a second of wall time count; the share of CPU time shows how busy
the machine was.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.load import load_recipe
from bascule.config.model import ModelConfig
from bascule.config.training import SftConfig
from bascule.data.tokenizer import Tokenizer
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise, save_hf
from bascule.stages.course import course
from bascule.train.objective import Batch
from bascule.train.sft import Sft
from bascule.train.step import Stepper

ROOT = Path(__file__).resolve().parents[2]
RATE, SKIPPED = 1e-3, 3
_SMALL: dict[str, Any] = dict(hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
                              v_head_dim=64, qk_nope_head_dim=32, qk_rope_head_dim=32, kv_lora_rank=128, vocab_size=1024)  # fmt: skip
MODELS = {
    "nano": ({"preset": "nano", "vocab_size": 128}, 64, 48, 1.5),
    "demo": ({"preset": "nano", "vocab_size": Tokenizer().vocab_size}, 64, 0, 1.5),
    "moe": (
        {**_SMALL, "intermediate_size": 768, "moe_intermediate_size": 192, "n_routed_experts": 8, "num_experts_per_tok": 2},
        8, 128, 1.5,
    ),
    "dense": ({**_SMALL, "attention": "gqa", "ffn": "swiglu", "intermediate_size": 768}, 8, 128, 1.3),
}  # fmt: skip
"""Name to (shape, rows, tokens of a row or 0 for the demo's examples, the bar: how many times theirs)."""


@dataclass(frozen=True)
class Timing:
    tokens_per_s: float
    tokens_per_core_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for name in options.models.split(","):
        row = compare(name, options.steps, options.rounds)
        rows.append(row)
        print(
            f"{name}: {row['parameters']:,} parameters, {row['batch']}; losses agree to {row['worst']:.1e}\n"
            f"  ours {row['ours']:,.0f} tokens/s, transformers ({row['experts']}) {row['theirs']:,.0f}: {row['ratio']:.2f}x (bar {row['bar']}x);"
            f"  by core-seconds {row['core_ratio']:.2f}x",
            flush=True,
        )
    if options.json:
        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.processor() or platform.machine(),
            "threads": options.threads,
        }
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    return 0 if all(row["ratio"] >= row["bar"] for row in rows) else 1


def compare(name: str, steps: int, rounds: int) -> dict[str, Any]:
    shape, rows, length, bar = MODELS[name]
    config = ModelConfig(**shape)
    batches = sequences(config.vocab_size, rows, length + 1, steps) if length else solved(steps)
    with tempfile.TemporaryDirectory() as folder:
        first = Transformer(config)
        initialise(first, seed=0)
        save_hf(first, config, Path(folder))
        del first
        kinds = ["eager", "grouped_mm", "batched_mm"] if config.ffn == "moe" else [None]
        losses, _ = ours(config, batches)
        worst = 0.0
        for kind in kinds:
            found, _ = theirs(folder, batches, kind, losses=True)
            worst = max(worst, *(abs(a - b) / b for a, b in zip(losses, found, strict=True)))
        if worst > 1e-3:
            sys.exit(
                f"{name}: the losses differ by up to {worst:.1e}; 1e-3 is allowed. Nothing was timed."
            )
        mine: list[Timing] = []
        other: dict[str, list[Timing]] = {str(kind): [] for kind in kinds}
        for _ in range(rounds):
            mine.append(ours(config, batches)[1])
            for kind in kinds:
                other[str(kind)].append(theirs(folder, batches, kind)[1])
    best = {kind: max(one.tokens_per_s for one in timings) for kind, timings in other.items()}
    fastest = max(best, key=lambda kind: best[kind])
    core = [
        max(one.tokens_per_core_s for one in timings) for timings in (mine, sum(other.values(), []))
    ]
    our_best = max(one.tokens_per_s for one in mine)
    return {
        "model": name, "parameters": sum(p.numel() for p in Transformer(config).parameters()), "batch": f"{rows} x {length or 'padded'}", "worst": worst,
        "ours": our_best, "theirs": best[fastest], "experts": fastest, "ratio": our_best / best[fastest], "core_ratio": core[0] / core[1],
        "bar": bar,
    }  # fmt: skip


Tensors = dict[str, Tensor]
"""As `Batch` has them."""


def solved(steps: int) -> list[Tensors]:
    """The first batches that the demo's SFT learns from."""
    recipe = load_recipe(ROOT / "runs" / "demo.toml")
    made = course(recipe)
    sft = Sft(recipe.sft, made.examples(0), seed=0, pad_id=made.tokenizer.pad_id)
    return [dict(sft.next_batch(step).tensors) for step in range(1, steps + 1)]


def sequences(vocabulary: int, rows: int, length: int, steps: int) -> list[Tensors]:
    """A language that can be learned: each token follows from the one before, one in eight is random."""
    generator = torch.Generator().manual_seed(0)
    follower = torch.randperm(vocabulary, generator=generator)
    found = []
    for _ in range(steps):
        batch_BT = torch.randint(vocabulary, (rows, length), generator=generator)
        for t in range(1, length):
            odd = torch.rand(rows, generator=generator) < 1 / 8
            batch_BT[:, t] = torch.where(odd, batch_BT[:, t], follower[batch_BT[:, t - 1]])
        real_BT = torch.ones_like(batch_BT[:, 1:], dtype=torch.bool)
        found.append(
            {"tokens": batch_BT[:, :-1].contiguous(), "targets": batch_BT[:, 1:].contiguous(), "real": real_BT, "mask": real_BT.float()}
        )  # fmt: skip
    return found


def ours(config: ModelConfig, batches: Sequence[Tensors]) -> tuple[list[float], Timing]:
    model = Transformer(config)
    initialise(model, seed=0)
    stepper = Stepper(model, CpuAccelerator())
    sft = SftConfig(learning_rate=RATE, muon_learning_rate=0.0, warmup_steps=0, final_learning_rate_ratio=1.0)  # fmt: skip
    stepper.begin(Sft(sft, [([0], [0])], seed=0, pad_id=0))
    losses, clock = [], Clock()
    for step, tensors in enumerate(batches, start=1):
        proposal = stepper.propose(Batch("sft", step, tensors))
        stepper.commit(proposal)
        losses.append(proposal.loss)
        clock.step_ended()
    return losses, clock.timing(batches)


def theirs(
    folder: str, batches: Sequence[Tensors], experts: str | None, *, losses: bool = False
) -> tuple[list[float], Timing]:
    kind = {"experts_implementation": experts} if experts else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kind)
    examples = []
    for one in batches:
        labels_BT = one["targets"].masked_fill(one["mask"] == 0, -100)
        for row, labels in zip(one["tokens"], labels_BT, strict=True):
            examples.append({"input_ids": row, "labels": labels, "shift_labels": labels})
    clock = Clock()

    class OnStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ended()

    with tempfile.TemporaryDirectory() as out:
        trainer = InOrder(
            model=model,
            args=TrainingArguments(
                out, per_device_train_batch_size=len(batches[0]["tokens"]), max_steps=len(batches), learning_rate=RATE, lr_scheduler_type="constant",
                adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", use_cpu=True, report_to="none", remove_unused_columns=False,
                save_strategy="no", disable_tqdm=True, logging_strategy="steps" if losses else "no", logging_steps=1,
            ),
            train_dataset=examples,
            callbacks=[OnStep()],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], clock.timing(
        batches
    )


class InOrder(Trainer):
    """Reads the examples as they stand, as ours does."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def step_ended(self) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def timing(self, batches: Sequence[Tensors]) -> Timing:
        """Over the steps after the first few, which warm up caches and allocators."""
        (start, start_core), (end, end_core) = self.at[SKIPPED - 1], self.at[-1]
        tokens = sum(int(batch["real"].sum()) for batch in batches[SKIPPED:])
        return Timing(tokens / (end - start), tokens / (end_core - start_core))


if __name__ == "__main__":
    raise SystemExit(main())
