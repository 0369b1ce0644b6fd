"""One step of every phase on the tick model, from small made-up batches, on any chip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bascule.accelerators.base import Accelerator
from bascule.config.model import ModelConfig
from bascule.config.training import GrpoConfig, PretrainConfig, SftConfig
from bascule.data.shards import Text
from bascule.model import weights
from bascule.model.transformer import Transformer
from bascule.records import Completion, RolloutReply, RolloutRequest
from bascule.train.grpo import Grpo
from bascule.train.objective import Objective
from bascule.train.pretrain import Pretrain, Reading
from bascule.train.sft import Sft
from bascule.train.step import Stepper

VOCABULARY = 40
EXAMPLES = [([1, 5 + n], [7 + n % 3, 9, *range(10, 12 + n), 2]) for n in range(8)]


def stepper(chip: Accelerator) -> Stepper:
    model = Transformer(ModelConfig(preset="tick", vocab_size=VOCABULARY))
    weights.initialise(model, 0)
    return Stepper(chip.move(model), chip, router_bias_speed=1e-3)


def sampled(request: RolloutRequest) -> RolloutReply:
    """Completions of different lengths that all ended."""
    said = [[5 + (n + t) % 20 for t in range(3 + n % 4)] + [2] for n in range(len(request.prompts) * request.group_size)]  # fmt: skip
    return RolloutReply([Completion(one, [-3.0] * len(one), "stop") for one in said], None, None, 0.0)  # fmt: skip


def paid(owners: Sequence[int], completions: Sequence[list[int]]) -> list[float]:
    return [float(len(tokens) % 2) for tokens in completions]


def objectives(taking: Stepper) -> dict[str, Objective]:
    """Each phase's, with its first step at 1: the optimizers of SFT and pretraining have Muon, GRPO compares with the first minibatch and the second."""
    ids = np.arange(400) % 30 + 5
    text = Text([ids.astype(np.uint16)], [np.arange(40, 401, 40).astype(np.uint64)])
    reading = Reading(text, 16, np.full(VOCABULARY, 2), True)
    grpo = GrpoConfig(steps=2, prompts=4, group_size=4, updates_per_rollout=2, max_completion_tokens=8)  # fmt: skip
    return {
        "sft": Sft(SftConfig(steps=2, batch_sequences=4), EXAMPLES, seed=0, pad_id=0),
        "pretrain": Pretrain(
            PretrainConfig(data="x", steps=2, batch_sequences=4, sequence_length=16), reading, seed=0
        ),
        "grpo": Grpo(
            grpo, [prompt for prompt, _ in EXAMPLES], seed=0, pad_id=0, sampler=sampled, score=taking.score, reward=paid
        ),
    }  # fmt: skip
