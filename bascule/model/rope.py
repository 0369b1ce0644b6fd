"""Rotary frequencies: plain, and stretched for longer contexts than the model was first trained for. Held to transformers' (tests).

F frequencies, half the rotary width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bascule.config.model import RopeScaling


def frequencies(size: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Turns per token in radians, [F] fp32."""
    plain_F = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    if scaling is None:
        return plain_F
    return _llama3(plain_F, scaling) if scaling.rope_type == "llama3" else _yarn(plain_F, size, theta, scaling)  # fmt: skip


def _llama3(plain_F: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: long waves are stretched by `factor`, short ones kept, those between go over smoothly."""
    waves_F = scaling.original_max_position_embeddings * plain_F / (2.0 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_F = ((waves_F - low) / (high - low)).clamp(0.0, 1.0)
    return plain_F * kept_F + plain_F / scaling.factor * (1.0 - kept_F)


def _yarn(plain_F: Tensor, size: int, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071): frequencies that turn less than `beta_slow` times over the first context are stretched, those above
    `beta_fast` kept, a ramp over their indices between."""

    def index(turns: float) -> float:
        context = scaling.original_max_position_embeddings
        return size * math.log(context / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    stretched_F = ((torch.arange(size // 2).float() - first) / (last - first)).clamp(0.0, 1.0)
    return plain_F * (1.0 - stretched_F) + plain_F / scaling.factor * stretched_F


def table_gain(scaling: RopeScaling | None) -> float:
    """What sine and cosine are multiplied with (YaRN's temperature, one half on queries and one on keys)."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)  # fmt: skip
    return _mscale(scaling.factor, 1.0)


def score_gain(scaling: RopeScaling | None) -> float:
    """What MLA multiplies its scores with besides: DeepSeek puts the temperature on the whole head, unrotated half included."""
    if scaling is None or scaling.rope_type != "yarn" or not scaling.mscale_all_dim:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
