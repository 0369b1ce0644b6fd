"""Numbers stay still: the `tick` reference run shows the loss bits it showed when golden/tick.json was written.

A refactor must not move them. What is meant to move them says so in its commit and writes the file anew:

    python tests/train/test_golden.py

Bits belong to a version of torch and to a kind of CPU (kernels differ); elsewhere the test is skipped and says what differs.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.config.training import DataConfig, GrpoConfig, SftConfig
from bascule.data import chat, corpus
from bascule.data.tokenizer import Tokenizer
from bascule.infer.engine import Engine
from bascule.infer.sampling import Sampling
from bascule.model import kernels, weights
from bascule.model.transformer import Transformer
from bascule.records import RolloutReply, RolloutRequest
from bascule.train.grpo import Grpo
from bascule.train.objective import Objective
from bascule.train.sft import Sft
from bascule.train.step import Stepper

GOLDEN = Path(__file__).parent / "golden" / "tick.json"


def machine() -> dict[str, str]:
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "compiler": compiler(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("vendor_id", "cpu family", "model"):
            facts.setdefault(name.strip(), value.strip())
    return facts


def compiler() -> str:
    """What compiled our own kernels; "none" where the model runs on PyTorch's pieces."""
    found = shutil.which("g++") or shutil.which("clang++")
    if kernels.compiled() is None or found is None:
        return "none"
    return subprocess.run([found, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]  # fmt: skip


def losses() -> dict[str, list[str]]:
    """Loss of every step in hexadecimal: six of SFT, four of GRPO by two rollouts."""
    torch.set_num_threads(1)
    tokenizer, accelerator = Tokenizer(), CpuAccelerator()
    problems = corpus.split(DataConfig(train_problems=64, eval_problems=16), 0).train
    pairs = corpus.sft_examples(problems, 0)
    examples = [
        (tokenizer.encode(prompt), [*tokenizer.encode(said), tokenizer.eos_id])
        for prompt, said in pairs
    ]
    model = Transformer(ModelConfig(preset="tick", vocab_size=tokenizer.vocab_size))
    weights.initialise(model, 0)
    stepper = Stepper(model, accelerator, router_bias_speed=1e-3)
    engine = Engine(model, accelerator, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)

    def sample(request: RolloutRequest) -> RolloutReply:
        sampling = Sampling(
            max_tokens=request.max_tokens, seed=0, purpose=request.purpose, step=request.step
        )
        return RolloutReply(
            engine.generate(request.prompts, sampling, group_size=request.group_size),
            None,
            None,
            0.0,
        )

    def reward(owners: object, completions: list[list[int]]) -> list[float]:
        return [float(len(tokens) % 2) for tokens in completions]

    sft = Sft(
        SftConfig(steps=6, batch_sequences=8, warmup_steps=2),
        examples,
        seed=0,
        pad_id=tokenizer.pad_id,
    )
    grpo = Grpo(
        GrpoConfig(steps=4, prompts=4, group_size=4, max_completion_tokens=60),
        [tokenizer.encode(chat.prompt(problem.question)) for problem in problems],
        seed=0, pad_id=tokenizer.pad_id, sampler=sample, score=stepper.score, reward=reward, first_step=7,
    )  # fmt: skip
    found: dict[str, list[str]] = {}
    phases: list[Objective] = [sft, grpo]
    for objective in phases:
        stepper.begin(objective)
        for step in range(objective.first_step, objective.first_step + objective.steps):
            proposal = stepper.propose(objective.next_batch(step))
            stepper.commit(proposal)
            found.setdefault(objective.phase, []).append(proposal.loss.hex())
    return found


def test_the_reference_run_shows_the_loss_bits_it_always_showed() -> None:
    golden = json.loads(GOLDEN.read_text())
    here = machine()
    odd = {
        name: (value, here.get(name))
        for name, value in golden["machine"].items()
        if here.get(name) != value
    }
    if odd:
        pytest.skip(f"golden bits are of another machine: {odd} (theirs, here)")
    assert losses() == golden["losses"]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"machine": machine(), "losses": losses()}, indent=1) + "\n")
