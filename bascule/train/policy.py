"""From rewards to a policy loss, as pure functions.

GRPO as practised in late 2026 (training.md 2.6): advantage = reward - group mean, without division by the deviation (Dr. GRPO,
arXiv 2503.20783); groups without contrast dropped, truncated answers masked, token-level mean and a higher upper clip (DAPO,
arXiv 2503.14476); no KL; the rollout engine's deviation from the trainer corrected per token by truncated importance sampling.
Shapes: B samples, T positions, V vocabulary, P prompts, G samples of a prompt. All log-probabilities in nats.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def advantages(rewards_PG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Reward minus the mean of its group."""
    centred: NDArray[np.float64] = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    return centred


def with_contrast(rewards_PG: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(P,) true for groups whose rewards differ; the others carry no gradient and would only dilute the mean."""
    differs: NDArray[np.bool_] = rewards_PG.max(axis=1) > rewards_PG.min(axis=1)
    return differs


def importance(trainer_BT: Tensor, rollout_BT: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_rollout, cap) per token, from log-probabilities; a constant to autograd."""
    return (trainer_BT - rollout_BT).exp().clamp(max=cap).detach()


def clipped_loss(
    new_BT: Tensor,
    old_BT: Tensor,
    advantage_B1: Tensor,
    weight_BT: Tensor,
    mask_BT: Tensor,
    low: float,
    high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, mean over all counted tokens of the batch. `new`, `old`: log-probabilities in the trainer."""
    count = mask_BT.sum()
    ratio_BT = ((new_BT - old_BT) * mask_BT).exp()
    plain_BT = ratio_BT * advantage_B1
    clipped_BT = ratio_BT.clamp(1.0 - low, 1.0 + high) * advantage_B1
    loss = -(torch.minimum(plain_BT, clipped_BT) * weight_BT * mask_BT).sum() / count
    with torch.no_grad():
        metrics = {
            "clipped_low_ratio": ((ratio_BT < 1.0 - low) * (advantage_B1 < 0) * mask_BT).sum()
            / count,
            "clipped_high_ratio": ((ratio_BT > 1.0 + high) * (advantage_B1 > 0) * mask_BT).sum()
            / count,
            "max_policy_ratio": ratio_BT.max(),
        }
    return loss, metrics


def entropy(logits_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean entropy in nats of the policy at the counted positions."""
    logp_BTV = logits_BTV.detach().float().log_softmax(-1)
    return (-(logp_BTV.exp() * logp_BTV).sum(-1) * mask_BT).sum() / mask_BT.sum()
