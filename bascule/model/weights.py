"""Weights: first values, fingerprints, and Hugging Face folders in both directions.

On disk the experts lie one by one (`mlp.experts.3.gate_proj.weight`), in memory stacked; every other name is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from bascule import draws
from bascule.config import ModelConfig
from bascule.model.transformer import Transformer


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter as a function of (seed, its name, its shape); norms become 1, biases and router biases 0.

    Matrices get a normal of variance 1/fan-in, the two that write to the residual stream (`o_proj`, `down_proj`) divided by
    sqrt(2 * layers) so that its variance does not grow with depth; embedding and router 0.02.
    """
    for name, parameter in model.named_parameters():
        std = _first_std(name, parameter, model.config)
        if std is None:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        generator = draws.generator(draws.key(seed, f"init/{name}"))
        values = generator.standard_normal(tuple(parameter.shape), dtype="float32") * std
        parameter.copy_(torch.from_numpy(values))
    for moe in model.moe_layers():
        moe.gate.e_score_correction_bias.zero_()


def _first_std(name: str, parameter: Tensor, config: ModelConfig) -> float | None:
    if parameter.ndim < 2:
        return None
    if "embed_tokens" in name or "lm_head" in name or name.endswith("gate.weight"):
        return 0.02
    std = float(parameter.shape[-1] ** -0.5)
    writes_residual = "o_proj" in name or "down_proj" in name
    return std / float((2 * config.num_hidden_layers) ** 0.5) if writes_residual else std


def fingerprint(model: Transformer) -> str:
    """SHA-256 of every parameter and persistent buffer. Equal on every device that holds equal bytes."""
    return fingerprint_state(model.state_dict())


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes, names sorted."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
