"""The GRPO phase: ask for groups of samples, have them rewarded and scored, deal them into minibatches (training.md 2.6).

The algorithm itself is in policy.py and correction.py, as small pure functions, what is asked in curriculum.py; this file only
fetches and deals. One rollout serves `updates_per_rollout` optimizer steps. B samples, T positions, P prompts, G samples of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bascule.config.training import GrpoConfig
from bascule.errors import UsageError
from bascule.model.routing import unpack
from bascule.model.transformer import Output
from bascule.records import Completion, RolloutReply, RolloutRequest
from bascule.train import correction, schedule
from bascule.train.curriculum import Curriculum
from bascule.train.mismatch import mismatch
from bascule.train.objective import Batch, collate, counted_readout, seated, spread
from bascule.train.optimizer import SplitOptimizer
from bascule.train.policy import (
    ALGORITHMS,
    Clip,
    clip_metrics,
    with_contrast,
)
from bascule.train.state import StateDict

Sampler = Callable[[RolloutRequest], RolloutReply]
Ahead = Callable[[RolloutRequest], Callable[[], RolloutReply]]
"""A sampler that is asked now and answers when its result is called, with the weights of the moment it was asked."""
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


@dataclass(frozen=True)
class Asked:
    """A rollout under way: its number, its prompts, and the completions that will come."""

    rollout: int
    chosen: list[int]
    answer: Callable[[], RolloutReply]


def deal(groups: Sequence[Group], hands: int) -> list[list[Group]]:
    """Deal whole groups into `hands` minibatches as evenly as possible; a hand may stay empty.

    Whole groups, so that the advantages of every minibatch sum to zero.
    """
    return [list(groups[i::hands]) for i in range(hands)]


class Grpo:
    """The phase's objective. Its state: the minibatches of this rollout and the last, what the curriculum has seen, and with
    `one_step_off` the answers to the rollout that was asked ahead."""

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
        ahead: Ahead | None = None,
        difficulties: Sequence[float] | None = None,
    ) -> None:
        if not prompts:
            raise UsageError(
                "GRPO was asked to train on no prompts. Add training problems, or drop the grpo phase."
            )
        if config.one_step_off and ahead is None:
            raise UsageError("grpo.one_step_off was asked of a sampler that cannot be asked ahead.")
        self.config, self.prompts, self.seed, self.pad_id = config, prompts, seed, pad_id
        self.sampler, self.ahead, self.score, self.reward = sampler, ahead, score, reward
        self.first_step, self.steps = first_step, config.steps
        self.clip_grad_norm = config.clip_grad_norm
        self.algorithm = ALGORITHMS[config.algorithm]
        self.clip = Clip(config.clip_low, config.clip_high, config.max_completion_tokens)
        self.curriculum = Curriculum(config, len(prompts), seed, difficulties)
        self._rollout = -1
        self._dealt: list[Batch] = []
        self._before: list[Batch] = []
        self._asked: Asked | None = None

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
        if self.remembers(step):
            return next(batch for batch in self._before + self._dealt if batch.step == step)
        rollout, turn = divmod(step - self.first_step, self.config.updates_per_rollout)
        self._before, self._dealt = self._dealt, self._roll_out(rollout)
        self._rollout = rollout
        return self._dealt[turn]

    def remembers(self, step: int) -> bool:
        """Can the batch of `step` be had again? It can for this rollout and the one before; a resumed run knows them too."""
        return any(batch.step == step for batch in self._before + self._dealt)

    def loss(self, output: Output, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Without `old_logprobs` the batch is learnt from by the very weights it is compared with: the ratio is 1."""
        mask_BT, rollout_BT = tensors["mask"], tensors["rollout_logprobs"]
        new_BT, mean_entropy = counted_readout(output, tensors, self.config.temperature)
        old_BT = tensors.get("old_logprobs", new_BT.detach())
        weight_BT = correction.weights(old_BT, rollout_BT, mask_BT, self.config)
        advantage_B1 = tensors["advantages"][:, None]
        loss = self.algorithm.loss(new_BT, old_BT, advantage_B1, weight_BT, mask_BT, self.clip)
        metrics = clip_metrics(new_BT, old_BT, advantage_B1, mask_BT, self.clip)
        metrics["entropy"] = mean_entropy()
        if output.routes_agree is not None:
            agree_LBT = output.routes_agree.view(-1, *mask_BT.shape)
            metrics["router_agreement"] = (agree_LBT * mask_BT).sum() / mask_BT.sum() / len(agree_LBT)  # fmt: skip
        if "old_logprobs" not in tensors:
            found = self._mismatch({**tensors, "old_logprobs": old_BT})
            metrics.update(found)
        return loss, metrics

    def state_dict(self) -> StateDict:
        """Waits for what was asked ahead: answers that are on their way would be lost."""
        batches = self._before + self._dealt
        state: StateDict = {
            "rollout": self._rollout,
            "before": len(self._before),
            "steps": [b.step for b in batches],
            "notes": [b.notes for b in batches],
            "curriculum": self.curriculum.state_dict(),
            "asked": None,
        }
        if self._asked:
            answers = [asdict(one) for one in self._asked.answer().completions]
            state["asked"] = [self._asked.rollout, self._asked.chosen, answers]
        for turn, batch in enumerate(batches):
            state.update({f"{turn}/{name}": tensor for name, tensor in batch.tensors.items()})
        return state

    def load_state_dict(self, state: StateDict) -> None:
        self._rollout = int(state["rollout"])
        batches = []
        for turn, (step, notes) in enumerate(zip(state["steps"], state["notes"], strict=True)):
            mine = f"{turn}/"
            tensors = {
                name.removeprefix(mine): t for name, t in state.items() if name.startswith(mine)
            }
            batches.append(Batch(self.phase, step, tensors, notes))
        self._before, self._dealt = batches[: state["before"]], batches[state["before"] :]
        self.curriculum.load_state_dict(state["curriculum"])
        self._asked = None
        if state["asked"]:
            rollout, chosen, answers = state["asked"]
            reply = RolloutReply([Completion(**one) for one in answers], None, None, 0.0)
            self._asked = Asked(rollout, chosen, lambda: reply)

    def _roll_out(self, rollout: int) -> list[Batch]:
        config, updates = self.config, self.config.updates_per_rollout
        step = self.first_step + rollout * updates
        groups, completions, rewards_PG = self._gather(rollout, step)
        tensors = [self._collate(hand) for hand in deal(groups, updates)]
        for each in tensors[
            1:
        ]:  # the first is learnt from by these very weights: its ratio is 1 (loss)
            if each:
                each["old_logprobs"] = self.score(each, step, config.temperature)
        notes = _sampling_notes(completions, rewards_PG)
        if config.retire_after:
            notes["retired_prompts"] = float(len(self.curriculum.retired))
        if config.one_step_off:
            notes["staleness"] = float(updates if rollout else 0)
            if step + updates < self.first_step + self.steps:
                self._asked = self._ask_ahead(rollout + 1)
        return [
            Batch(
                self.phase,
                step + turn,
                each,
                {
                    **(notes if turn == 0 else {}),
                    **{name: float(value) for name, value in self._mismatch(each).items()},
                },
            )
            for turn, each in enumerate(tensors)
        ]

    def _gather(
        self, rollout: int, step: int
    ) -> tuple[list[Group], list[Completion], NDArray[np.float64]]:
        """Groups with contrast; all completions and rewards (P,G). Asks again while too few groups have contrast, if it may."""
        config = self.config
        groups: list[Group] = []
        completions: list[Completion] = []
        rewards: list[NDArray[np.float64]] = []
        for again in range(1 + config.refill_rounds):
            if again == 0 and self._asked and self._asked.rollout == rollout:
                chosen, found = self._asked.chosen, self._asked.answer().completions
                self._asked = None
            else:
                chosen = self.curriculum.take(config.prompts - len(groups), self._progress(step))
                found = self.sampler(self._request(step, chosen, len(completions))).completions
            _refuse_short(found, len(chosen) * config.group_size)
            owners = [index for index in chosen for _ in range(config.group_size)]
            paid = self.reward(owners, [c.tokens for c in found])
            rewards.append(np.array(paid, dtype=np.float64).reshape(len(chosen), -1))
            self.curriculum.learn(chosen, rewards[-1])
            groups += self._contrasting(chosen, found, rewards[-1])
            completions += found
            if len(groups) >= config.prompts:
                break
        return groups, completions, np.concatenate(rewards)

    def _ask_ahead(self, rollout: int) -> Asked:
        assert self.ahead is not None
        step = self.first_step + rollout * self.config.updates_per_rollout
        chosen = self.curriculum.take(self.config.prompts, self._progress(step))
        return Asked(rollout, chosen, self.ahead(self._request(step, chosen, 0)))

    def _progress(self, step: int) -> float:
        return (step - self.first_step) / max(1, self.steps)

    def _request(self, step: int, chosen: Sequence[int], first_index: int) -> RolloutRequest:
        config = self.config
        return RolloutRequest(
            step=step,
            prompts=[self.prompts[index] for index in chosen],
            group_size=config.group_size,
            max_tokens=config.max_completion_tokens,
            temperature=config.temperature,
            seed=self.seed,
            purpose="grpo",
            first_index=first_index,
            routes=config.router_replay,
        )

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
        if kept[0][1].routes:  # of each sample by itself, prompts included: nothing is shared
            tensors["routes"] = _routes(kept, tensors["tokens"].shape[1])
            tensors["counted"] = tensors["mask"].flatten().nonzero()[:, 0]
        else:
            tensors |= seated(_ended(groups), tensors["tokens"].shape[1])
        return tensors

    def _mismatch(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Figures over the tokens of one minibatch, where they live; nothing when they were not scored."""
        if "old_logprobs" not in tensors:
            return {}
        pair = (tensors["old_logprobs"], tensors["rollout_logprobs"])
        weight_BT = correction.weights(*pair, tensors["mask"], self.config)
        # By number, not by the mask, whose ones would have to be counted first, which stops a GPU; the guard's cut of a batch and older
        # batches have no numbers.
        where = tensors["counted"] if "counted" in tensors else tensors["mask"].flatten().bool()
        trainer_N, rollout_N, weight_N = (each.flatten()[where] for each in (*pair, weight_BT))
        found = mismatch(trainer_N, rollout_N, weight_N, self.config.importance_cap)
        return {f"mismatch_{name}": value for name, value in found.items()}


def _ended(groups: Sequence[Group]) -> list[tuple[list[int], list[list[int]]]]:
    """Each prompt with its completions that ended, where there are any."""
    ended = [
        (group.prompt, [one.tokens for one in group.samples if one.finish == "stop"])
        for group in groups
    ]
    return [(prompt, said) for prompt, said in ended if said]


def _routes(kept: Sequence[tuple[list[int], Completion, float]], width: int) -> Tensor:
    """(B,T,C) int16, as model.routing replays them; 0 at the padding."""
    found = [unpack(one.routes, len(prompt) + len(one.tokens) - 1) for prompt, one, _ in kept]
    routes_BTC = np.zeros((len(found), width, found[0].shape[1]), np.int16)
    for row, routes in enumerate(found):
        routes_BTC[row, : len(routes)] = routes
    return torch.from_numpy(routes_BTC)


def _refuse_short(completions: Sequence[Completion], wanted: int) -> None:
    if len(completions) != wanted:
        raise ValueError(
            f"The sampler was asked for {wanted} completions and gave {len(completions)}."
        )


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
