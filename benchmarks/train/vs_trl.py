"""GRPO steps a second against TRL's GRPOTrainer: same model, same prompts, same reward, sampling included, each in one process.

    python3 -m venv /tmp/trl && /tmp/trl/bin/pip install -c constraints.txt torch trl
    python benchmarks/train/vs_trl.py --trl /tmp/trl/bin/python [--threads 1] [--steps 4]

The demo's model (nano, 0.46 M parameters) learns the task's form first, so that answers end. Then 32 prompts x 8 samples a step, one
update, no KL. The reward is the parity of the answer's length: anybody can compute it, and nearly every group has contrast, so
neither side saves work. Before the speeds are believed, mean length and reward of the two must agree: they sample from the same policy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS, GROUP, LONGEST, RATE = 32, 8, 48, 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trl", required=True, help="python of an environment with trl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sft-steps", type=int, default=120)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(trl_side(Path(options.side), options.steps, options.threads)))
        return 0
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        grpo = prepared(Path(folder), options.sft_steps, options.steps)
        found = {"bascule": ours(grpo, options.steps), "trl": theirs(folder, options)}
    for name, one in found.items():
        print(
            f"{name:8} {one['s_per_step']:7.2f} s a step, {one['core_s_per_step']:7.2f} core-s; mean length {one['length']:.1f}, "
            f"reward {one['reward']:.2f}"
        )
    ratio, core = (
        found["trl"][key] / found["bascule"][key] for key in ("s_per_step", "core_s_per_step")
    )
    print(f"{ratio:.1f}x by wall time, {core:.1f}x by core-seconds (bar 5x)")
    same = abs(found["trl"]["length"] / found["bascule"]["length"] - 1) < 0.1
    if not same:
        print("The two did not sample from the same policy; the ratio says nothing.")
    return 0 if same and ratio >= 5 else 1


def prepared(folder: Path, sft_steps: int, steps: int) -> Any:
    """(stepper, objective) of ours; the same model, tokenizer and prompts in `folder` for the other side."""
    from bascule.accelerators.cpu import CpuAccelerator
    from bascule.config.model import ModelConfig
    from bascule.config.training import DataConfig, GrpoConfig, SftConfig
    from bascule.data import chat, corpus
    from bascule.data.tokenizer import Tokenizer
    from bascule.infer.engine import Engine
    from bascule.infer.sampling import Sampling
    from bascule.model import weights
    from bascule.model.transformer import Transformer
    from bascule.records import RolloutReply, RolloutRequest
    from bascule.train.grpo import Grpo
    from bascule.train.sft import Sft
    from bascule.train.step import Stepper

    tokenizer, accelerator = Tokenizer(), CpuAccelerator()
    problems = corpus.split(DataConfig(train_problems=4096, eval_problems=16), 0).train
    examples = [
        (tokenizer.encode(prompt), [*tokenizer.encode(said), tokenizer.eos_id])
        for prompt, said in corpus.sft_examples(problems, 0)
    ]
    config = ModelConfig(preset="nano", vocab_size=tokenizer.vocab_size)
    model = Transformer(config)
    weights.initialise(model, 0)
    stepper = Stepper(model, accelerator, router_bias_speed=1e-3)
    sft = Sft(SftConfig(steps=sft_steps), examples, seed=0, pad_id=tokenizer.pad_id)
    stepper.begin(sft)
    for step in range(1, sft_steps + 1):
        stepper.commit(stepper.propose(sft.next_batch(step)))
    weights.save_hf(model, config, folder)
    tokenizer.save(folder)
    texts = [chat.prompt(problem.question) for problem in problems]
    (folder / "prompts.json").write_text(json.dumps(texts))

    engine = Engine(model, accelerator, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, native=True)  # fmt: skip

    def sample(request: RolloutRequest) -> RolloutReply:
        sampling = Sampling(max_tokens=request.max_tokens, seed=0, step=request.step)
        said = engine.generate(request.prompts, sampling, group_size=request.group_size)
        return RolloutReply(said, None, None, 0.0)

    settings = GrpoConfig(
        steps=steps, prompts=PROMPTS, group_size=GROUP, updates_per_rollout=1, max_completion_tokens=LONGEST, learning_rate=RATE,
    )  # fmt: skip
    grpo = Grpo(
        settings, [tokenizer.encode(text) for text in texts], seed=0, pad_id=tokenizer.pad_id, sampler=sample, score=stepper.score,
        reward=lambda owners, said: [parity(len(tokens)) for tokens in said],
    )  # fmt: skip
    stepper.step = 0
    stepper.begin(grpo)
    return stepper, grpo


def parity(length: int) -> float:
    return float(length % 2)


def ours(made: Any, steps: int) -> dict[str, float]:
    stepper, grpo = made
    at, notes = [clock()], []
    for step in range(1, steps + 1):
        proposal = stepper.propose(grpo.next_batch(step))
        stepper.commit(proposal)
        notes.append(proposal.metrics)
        at.append(clock())
    return spent(at) | {
        "length": notes[0]["completion_tokens"],
        "reward": notes[0]["reward"],
    }


def theirs(folder: str, options: argparse.Namespace) -> dict[str, float]:
    command = [options.trl, __file__, "--trl", options.trl, "--side", folder, "--steps", str(options.steps), "--threads", str(options.threads)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})  # fmt: skip
    if done.returncode:
        sys.exit(f"TRL's side failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def trl_side(folder: Path, steps: int, threads: int) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig as Settings
    from trl import GRPOTrainer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = json.loads((folder / "prompts.json").read_text())
    lengths: list[float] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
        return [parity(len(ids)) for ids in completion_ids]

    at: list[tuple[float, float]] = []
    rewards: list[float] = []

    class OnStep(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            at.append(clock())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            at.append(clock())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            rewards.extend([logs["reward"]] if "reward" in logs else [])

    with tempfile.TemporaryDirectory() as out:
        settings = Settings(
            out, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, max_completion_length=LONGEST, max_steps=steps,
            learning_rate=RATE, temperature=1.0, beta=0.0, num_iterations=1, loss_type="dapo", scale_rewards="none",
            mask_truncated_completions=True, use_cpu=True, bf16=False, gradient_checkpointing=False, optim="adamw_torch_fused",
            report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        GRPOTrainer(
            model=model, reward_funcs=reward, args=settings, train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer, callbacks=[OnStep()],
        ).train()  # fmt: skip
    return spent(at) | {"length": lengths[0], "reward": rewards[0]}


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def spent(at: list[tuple[float, float]]) -> dict[str, float]:
    """The quickest step of all: the first warms up, and a neighbour's load falls on single steps."""
    pairs = list(zip(at[:-1], at[1:], strict=True))
    return {
        "s_per_step": min(b[0] - a[0] for a, b in pairs),
        "core_s_per_step": min(b[1] - a[1] for a, b in pairs),
    }


if __name__ == "__main__":
    raise SystemExit(main())
