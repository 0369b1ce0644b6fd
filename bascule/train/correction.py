"""What a token that the rollout engine sampled is worth to the trainer, whose probabilities for it are not quite the same.

Each rule is a pure function from the two log-probabilities to a weight per token, a constant to autograd; the table at the end
names them. The engine may also be a step behind (grpo.one_step_off): the same weights correct that. B samples, T positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bascule.config.training import GrpoConfig

MAX_LOG_RATIO = 20.0
"""A sum of log ratios is cut here before it becomes a ratio: e^20 is past every cap, e^89 would be infinite in fp32."""


def uncorrected(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, c: GrpoConfig) -> Tensor:
    """As if the two agreed."""
    return torch.ones_like(trainer_BT)


def token(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, c: GrpoConfig) -> Tensor:
    """min(ratio, cap), token by token: truncated importance sampling (TIS; Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy training")."""
    return (trainer_BT - rollout_BT).exp().clamp(max=c.importance_cap)


def sequence(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, c: GrpoConfig) -> Tensor:
    """min(product of the sample's ratios, cap) for each of its tokens: unbiased until the cap, and of higher variance."""
    log_B1 = ((trainer_BT - rollout_BT) * mask_BT).sum(1, keepdim=True)
    ratio_B1 = log_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=c.importance_cap)
    return ratio_B1.expand_as(trainer_BT)


def icepop(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, c: GrpoConfig) -> Tensor:
    """The ratio inside the band [icepop_low, icepop_high], nothing outside it (IcePop; Ring-1T, arXiv 2510.18855)."""
    ratio_BT = (trainer_BT - rollout_BT).exp()
    return ratio_BT * ((ratio_BT >= c.icepop_low) & (ratio_BT <= c.icepop_high))


def geometric_guard(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, width: float) -> Tensor:  # fmt: skip
    """(B,1) 0 for samples whose geometric-mean ratio lies outside 1 +- width, else 1 (Liu & Li 2025, "When speed kills
    stability"). Published: 0.01 for long chains of big models; short samples of small ones want about 0.1."""
    length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1.0)
    mean_B1 = ((trainer_BT - rollout_BT) * mask_BT).sum(1, keepdim=True) / length_B1
    return ((mean_B1.exp() - 1.0).abs() <= width).to(trainer_BT.dtype)


RULES: dict[str, Callable[[Tensor, Tensor, Tensor, GrpoConfig], Tensor]] = {
    "none": uncorrected,
    "token": token,
    "sequence": sequence,
    "icepop": icepop,
}


@torch.no_grad()
def weights(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor, config: GrpoConfig) -> Tensor:
    """The weight of every token under the recipe's rule and guard, (B,T); 0 means that the token is masked."""
    weight_BT = RULES[config.correction](trainer_BT, rollout_BT, mask_BT, config)
    if config.sequence_guard > 0:
        weight_BT = weight_BT * geometric_guard(trainer_BT, rollout_BT, mask_BT, config.sequence_guard)  # fmt: skip
    return weight_BT
