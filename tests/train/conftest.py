"""A small real run: the tick model, the chain_sum task, the real engine as sampler. No stand-ins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bascule.accelerators.base import Accelerator
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
from bascule.train.loop import Plan
from bascule.train.objective import Objective
from bascule.train.rewards import verifier
from bascule.train.sft import Sft
from bascule.train.step import Judge, Stepper

SFT_STEPS, GRPO_STEPS = 3, 4


@dataclass
class Tiny:
    """Everything of one run, freshly initialised."""

    stepper: Stepper
    sft: Sft
    grpo: Grpo
    objectives: dict[str, Objective]

    def plan(self, folder: Path, every: int = 2) -> Plan:
        return Plan({"sft": SFT_STEPS, "grpo": GRPO_STEPS}, folder, every)

    def fingerprint(self) -> str:
        return weights.fingerprint_state(
            {n: t.detach() for n, t in self.stepper.model_state().items()}
        )


@pytest.fixture(scope="session")
def material():
    """(tokenizer, training problems, SFT examples as ids, prompts as ids)"""
    tokenizer = Tokenizer()
    problems = corpus.split(DataConfig(train_problems=64, eval_problems=16), 0).train
    examples = [
        (tokenizer.encode(prompt), [*tokenizer.encode(text), tokenizer.eos_id])
        for prompt, text in corpus.sft_examples(problems, 0)
    ]
    return (
        tokenizer,
        problems,
        examples,
        [tokenizer.encode(chat.prompt(p.question)) for p in problems],
    )


@pytest.fixture
def tiny(material):
    """Make a Tiny: `tiny()`; the same call always makes the same one. `reward` replaces the task's verifier."""
    tokenizer, problems, examples, prompts = material

    def make(
        accelerator: Accelerator | None = None,
        judge: Judge | None = None,
        reward=None,
        max_tokens=80,
    ) -> Tiny:
        accelerator = accelerator or CpuAccelerator()
        torch.set_num_threads(1)
        model = Transformer(ModelConfig(preset="tick", vocab_size=tokenizer.vocab_size))
        weights.initialise(model, 0)
        engine = Engine(model, accelerator, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)

        def sample(request: RolloutRequest) -> RolloutReply:
            sampling = Sampling(
                max_tokens=request.max_tokens,
                seed=request.seed,
                purpose=request.purpose,
                step=request.step,
            )
            return RolloutReply(
                engine.generate(request.prompts, sampling, group_size=request.group_size),
                None,
                None,
                0.0,
            )

        stepper = Stepper(model, accelerator, judge=judge, router_bias_speed=1e-3)
        sft = Sft(
            SftConfig(steps=SFT_STEPS, batch_sequences=8, warmup_steps=1),
            examples,
            seed=0,
            pad_id=tokenizer.pad_id,
        )
        grpo = Grpo(
            GrpoConfig(
                steps=GRPO_STEPS,
                prompts=4,
                group_size=4,
                updates_per_rollout=2,
                max_completion_tokens=max_tokens,
            ),
            prompts,
            seed=0,
            pad_id=tokenizer.pad_id,
            sampler=sample,
            score=stepper.score,
            reward=reward or by_length(tokenizer.eos_id),
            first_step=SFT_STEPS + 1,
        )
        return Tiny(stepper, sft, grpo, {"sft": sft, "grpo": grpo})

    make.verifier = verifier(problems, tokenizer)
    return make


def by_length(eos_id: int):
    """An untrained model never answers right; ending early is a reward it can earn, so that groups have contrast."""

    def reward(owners, completions):
        return [float(tokens[-1] == eos_id and len(tokens) % 2) for tokens in completions]

    return reward
