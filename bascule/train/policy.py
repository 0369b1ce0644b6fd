"""From rewards to a policy loss, as pure functions; the table at the end names the published combinations.

The default is GRPO as practised in late 2026 (training.md 2.6): advantage = reward - group mean, without division by the deviation
(Dr. GRPO); groups without contrast dropped, truncated answers masked, token-level mean and a higher upper clip (DAPO); no KL in
any of them. The rollout engine's deviation from the trainer enters as a weight per token (correction.py).
Shapes: B samples, T positions, V vocabulary, P prompts, G samples of a prompt. All log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rewards = NDArray[np.float64]


@dataclass(frozen=True)
class Clip:
    """The ratio may move within [1 - low, 1 + high]; `longest` is the longest completion allowed (Dr. GRPO's divisor)."""

    low: float
    high: float
    longest: int


PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Clip], Tensor]
"""(new_BT, old_BT log-probabilities in the trainer, advantage_B1, weight_BT, mask_BT, clip) -> scalar loss."""


def centred(rewards_PG: Rewards) -> Rewards:
    """Reward minus the mean of its group."""
    difference: Rewards = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    return difference


def standardised(rewards_PG: Rewards) -> Rewards:
    """Centred, then divided by the group's deviation: hard and easy prompts weigh more (what Dr. GRPO warns of)."""
    scaled: Rewards = centred(rewards_PG) / (rewards_PG.std(axis=1, keepdims=True) + 1e-6)
    return scaled


def with_contrast(rewards_PG: Rewards) -> NDArray[np.bool_]:
    """(P,) true for groups whose rewards differ; the others carry no gradient and would only dilute the mean."""
    differs: NDArray[np.bool_] = rewards_PG.max(axis=1) > rewards_PG.min(axis=1)
    return differs


def _ratio(new_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return ((new_BT - old_BT) * mask_BT).exp()


def _pessimistic(ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """PPO's surrogate: the lesser of the plain and the clipped gain (arXiv 1707.06347)."""
    return torch.minimum(
        ratio * advantage, ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * advantage
    )


def _gain(
    new_BT: Tensor,
    old_BT: Tensor,
    advantage_B1: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    clip: Clip,
) -> Tensor:
    """What every counted token adds to the surrogate; the three losses below differ in how they average it."""
    return _pessimistic(_ratio(new_BT, old_BT, mask_BT), advantage_B1, clip) * weight_BT * mask_BT


def token_level(
    new_BT: Tensor,
    old_BT: Tensor,
    advantage_B1: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    clip: Clip,
) -> Tensor:
    """Every token of the batch weighs the same (DAPO, arXiv 2503.14476)."""
    gain_BT = _gain(new_BT, old_BT, advantage_B1, weight_BT, mask_BT, clip)
    return -gain_BT.sum() / mask_BT.sum()


def sample_level(
    new_BT: Tensor,
    old_BT: Tensor,
    advantage_B1: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    clip: Clip,
) -> Tensor:
    """Every sample weighs the same, so tokens of long samples weigh less (GRPO, arXiv 2402.03300)."""
    gain_BT = _gain(new_BT, old_BT, advantage_B1, weight_BT, mask_BT, clip)
    return -(gain_BT.sum(1) / mask_BT.sum(1)).mean()


def constant_level(
    new_BT: Tensor,
    old_BT: Tensor,
    advantage_B1: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    clip: Clip,
) -> Tensor:
    """Divided by a constant, so that neither length nor the number of tokens bends the gradient (Dr. GRPO, arXiv 2503.20783)."""
    gain_BT = _gain(new_BT, old_BT, advantage_B1, weight_BT, mask_BT, clip)
    return -gain_BT.sum() / (len(new_BT) * clip.longest)


def gspo(
    new_BT: Tensor,
    old_BT: Tensor,
    advantage_B1: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    clip: Clip,
) -> Tensor:
    """One ratio a sample, the geometric mean of its tokens' (GSPO, arXiv 2507.18071). Wants a clip of about 3e-4 and 4e-4."""
    length_B = mask_BT.sum(1)
    ratio_B = (((new_BT - old_BT) * mask_BT).sum(1) / length_B).exp()
    weight_B = (weight_BT * mask_BT).sum(1) / length_B
    return -(_pessimistic(ratio_B, advantage_B1[:, 0], clip) * weight_B).mean()


def cispo(
    new_BT: Tensor,
    old_BT: Tensor,
    advantage_B1: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    clip: Clip,
) -> Tensor:
    """The ratio is a capped constant weight, so no token ever loses its gradient (CISPO, arXiv 2506.13585)."""
    ratio_BT = _ratio(new_BT, old_BT, mask_BT).detach().clamp(max=1.0 + clip.high)
    return -(ratio_BT * advantage_B1 * new_BT * weight_BT * mask_BT).sum() / mask_BT.sum()


@dataclass(frozen=True)
class Algorithm:
    advantages: Callable[[Rewards], Rewards]
    loss: PolicyLoss


ALGORITHMS = {
    "default": Algorithm(centred, token_level),
    "grpo": Algorithm(standardised, sample_level),
    "dr_grpo": Algorithm(centred, constant_level),
    "dapo": Algorithm(standardised, token_level),
    "gspo": Algorithm(standardised, gspo),
    "cispo": Algorithm(standardised, cispo),
}


@torch.no_grad()
def clip_metrics(
    new_BT: Tensor, old_BT: Tensor, advantage_B1: Tensor, mask_BT: Tensor, clip: Clip
) -> dict[str, Tensor]:
    """Shares of tokens beyond the clip on the side where it stops them, and the largest token ratio (over 4: collapse is near)."""
    ratio_BT, count = _ratio(new_BT, old_BT, mask_BT), mask_BT.sum()
    return {
        "clipped_low_ratio": ((ratio_BT < 1.0 - clip.low) * (advantage_B1 < 0) * mask_BT).sum()
        / count,
        "clipped_high_ratio": ((ratio_BT > 1.0 + clip.high) * (advantage_B1 > 0) * mask_BT).sum()
        / count,
        "max_policy_ratio": ratio_BT.max(),
    }
