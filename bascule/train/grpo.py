"""The GRPO phase: ask for groups of samples, have them rewarded and scored, deal them into minibatches (training.md 2.6).

The algorithm itself is in policy.py, as small pure functions; this file only fetches and deals. One rollout serves
`updates_per_rollout` optimizer steps. B samples, T positions, P prompts, G samples of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bascule.config import GrpoConfig
from bascule.errors import UsageError
from bascule.model.transformer import Output
from bascule.records import Completion, RolloutReply, RolloutRequest
from bascule.train import schedule
from bascule.train.mismatch import mismatch
from bascule.train.objective import Batch, choose, collate, spread, token_logprobs
from bascule.train.optimizer import SplitOptimizer
from bascule.train.policy import (
    ALGORITHMS,
    Clip,
    clip_metrics,
    entropy,
    importance,
    with_contrast,
)
from bascule.train.state import StateDict

Sampler = Callable[[RolloutRequest], RolloutReply]
Score = Callable[[Mapping[str, Tensor], int, float], Tensor]
"""(tensors of a batch, step, temperature) -> log-probabilities of its targets under the trainer's present weights, (B,T); this
is Stepper.score."""
Reward = Callable[[Sequence[int], Sequence[list[int]]], Sequence[float]]
"""(problem index of each completion, its token ids) -> reward of each."""


@dataclass(frozen=True)
class Group:
    """All samples of one prompt that has contrast."""

    prompt: list[int]
    samples: list[Completion]
    advantages: list[float]


def deal(groups: Sequence[Group], hands: int) -> list[list[Group]]:
    """Deal whole groups into `hands` minibatches as evenly as possible; a hand may stay empty.

    Whole groups, so that the advantages of every minibatch sum to zero.
    """
    return [list(groups[i::hands]) for i in range(hands)]


class Grpo:
    """The phase's objective. One rollout serves `updates_per_rollout` steps; minibatches not yet used are its only state."""

    phase = "grpo"

    def __init__(
        self,
        config: GrpoConfig,
        prompts: Sequence[list[int]],
        *,
        seed: int,
        pad_id: int,
        sampler: Sampler,
        score: Score,
        reward: Reward,
        first_step: int = 1,
    ) -> None:
        if not prompts:
            raise UsageError(
                "GRPO was asked to train on no prompts. Add training problems, or drop the grpo phase."
            )
        self.config = config
        self.prompts = prompts
        self.seed = seed
        self.pad_id = pad_id
        self.sampler = sampler
        self.score = score
        self.reward = reward
        self.first_step = first_step
        self.steps = config.steps
        self.clip_grad_norm = config.clip_grad_norm
        self.algorithm = ALGORITHMS[config.algorithm]
        self.clip = Clip(config.clip_low, config.clip_high, config.max_completion_tokens)
        self._rollout = -1
        self._dealt: list[Batch] = []

    def new_optimizer(self, model: nn.Module) -> SplitOptimizer:
        """AdamW for all: Muon gained nothing here (feasibility.md 4)."""
        parameters = dict(model.named_parameters())
        return SplitOptimizer(
            parameters,
            learning_rate=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
        )

    def learning_rate(self, step: int) -> tuple[float, float]:
        factor = schedule.linear(
            step - self.first_step,
            self.config.steps,
            warmup=self.config.warmup_steps,
            final=self.config.final_learning_rate_ratio,
        )
        return factor, factor * self.config.learning_rate

    def next_batch(self, step: int) -> Batch:
        """Samples, rewards and scores at the first of each `updates_per_rollout` steps, with the weights of that moment."""
        rollout, turn = divmod(step - self.first_step, self.config.updates_per_rollout)
        if rollout != self._rollout:
            self._dealt = self._roll_out(rollout)
            self._rollout = rollout
        return self._dealt[turn]

    def loss(self, output: Output, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits_BTV = output.logits_BTV / self.config.temperature
        mask_BT, old_BT = tensors["mask"], tensors["old_logprobs"]
        new_BT = token_logprobs(logits_BTV, tensors["targets"])
        weight_BT = importance(old_BT, tensors["rollout_logprobs"], self.config.importance_cap)
        advantage_B1 = tensors["advantages"][:, None]
        loss = self.algorithm.loss(new_BT, old_BT, advantage_B1, weight_BT, mask_BT, self.clip)
        metrics = clip_metrics(new_BT, old_BT, advantage_B1, mask_BT, self.clip)
        metrics["entropy"] = entropy(logits_BTV, mask_BT)
        return loss, metrics

    def state_dict(self) -> StateDict:
        state: StateDict = {
            "rollout": self._rollout,
            "steps": [b.step for b in self._dealt],
            "notes": [b.notes for b in self._dealt],
        }
        for turn, batch in enumerate(self._dealt):
            state.update({f"{turn}/{name}": tensor for name, tensor in batch.tensors.items()})
        return state

    def load_state_dict(self, state: StateDict) -> None:
        self._rollout = int(state["rollout"])
        self._dealt = []
        for turn, (step, notes) in enumerate(zip(state["steps"], state["notes"], strict=True)):
            mine = f"{turn}/"
            tensors = {
                name.removeprefix(mine): t for name, t in state.items() if name.startswith(mine)
            }
            self._dealt.append(Batch(self.phase, step, tensors, notes))

    def _roll_out(self, rollout: int) -> list[Batch]:
        config, updates = self.config, self.config.updates_per_rollout
        step = self.first_step + rollout * updates
        chosen = choose(
            self.seed, "grpo.prompts", rollout * config.prompts, config.prompts, len(self.prompts)
        )
        completions = self._sample(step, chosen)
        owners = [index for index in chosen for _ in range(config.group_size)]
        rewards_PG = np.array(
            self.reward(owners, [c.tokens for c in completions]), dtype=np.float64
        ).reshape(len(chosen), -1)
        groups = self._contrasting(chosen, completions, rewards_PG)
        tensors = [self._collate(hand) for hand in deal(groups, updates)]
        for each in tensors:
            if each:
                each["old_logprobs"] = self.score(each, step, config.temperature)
        notes = {**_sampling_notes(completions, rewards_PG), **self._mismatch_notes(tensors)}
        return [
            Batch(self.phase, step + turn, each, notes if turn == 0 else {})
            for turn, each in enumerate(tensors)
        ]

    def _sample(self, step: int, chosen: Sequence[int]) -> list[Completion]:
        config = self.config
        request = RolloutRequest(
            step=step,
            prompts=[self.prompts[index] for index in chosen],
            group_size=config.group_size,
            max_tokens=config.max_completion_tokens,
            temperature=config.temperature,
            seed=self.seed,
            purpose="grpo",
        )
        completions = self.sampler(request).completions
        if len(completions) != len(chosen) * config.group_size:
            raise ValueError(
                f"The sampler was asked for {len(chosen)} x {config.group_size} completions and gave {len(completions)}."
            )
        return completions

    def _contrasting(
        self, chosen: Sequence[int], completions: list[Completion], rewards_PG: NDArray[np.float64]
    ) -> list[Group]:
        size, advantages_PG = self.config.group_size, self.algorithm.advantages(rewards_PG)
        return [
            Group(
                self.prompts[chosen[p]],
                completions[p * size : (p + 1) * size],
                advantages_PG[p].tolist(),
            )
            for p, alive in enumerate(with_contrast(rewards_PG))
            if alive
        ]

    def _collate(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Tensors of one minibatch; truncated samples (they did not end) are left out after they helped make the group's mean."""
        kept = [
            (group.prompt, sample, advantage)
            for group in groups
            for sample, advantage in zip(group.samples, group.advantages, strict=True)
            if sample.finish == "stop"
        ]
        if not kept:
            return {}
        tensors = collate([(prompt, sample.tokens) for prompt, sample, _ in kept], self.pad_id)
        tensors["advantages"] = torch.tensor(
            [advantage for _, _, advantage in kept], dtype=torch.float32
        )
        tensors["rollout_logprobs"] = spread(
            [sample.logprobs for _, sample, _ in kept], tensors["mask"]
        )
        return tensors

    def _mismatch_notes(self, tensors: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Over all tokens that will be learnt from; nothing when there are none."""
        scored = [each for each in tensors if each]
        if not scored:
            return {}
        trainer_N, rollout_N = (
            torch.cat([each[name][each["mask"].bool()] for each in scored])
            for name in ("old_logprobs", "rollout_logprobs")
        )
        return {
            f"mismatch_{name}": value
            for name, value in mismatch(trainer_N, rollout_N, self.config.importance_cap).items()
        }


def _sampling_notes(
    completions: Sequence[Completion], rewards_PG: NDArray[np.float64]
) -> dict[str, float]:
    kept = float(with_contrast(rewards_PG).mean())
    return {
        "reward": float(rewards_PG.mean()),
        "kept_group_ratio": kept,
        "dead_group_ratio": 1.0 - kept,
        "truncated_ratio": float(np.mean([sample.finish == "length" for sample in completions])),
        "completion_tokens": float(np.mean([len(sample.tokens) for sample in completions])),
    }
