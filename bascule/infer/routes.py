"""The experts that sampled tokens went to, on their way from the engine to a trainer that replays them (grpo.router_replay).

The engine reads its finished sequences once more, whole, and writes down its choices: they are those of its chip and weights, though
not always those of the single decoding step, whose products are shaped otherwise and may round otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bascule.model.routing import pack, routes_of
from bascule.model.transformer import Transformer
from bascule.records import Completion

ROWS = 64
"""Sequences read at once."""


def with_routes(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    *,
    device: torch.device,
) -> list[Completion]:
    """The completions with their routes; as they were when the model has no experts. All samples of prompt 0 come first."""
    if not model.moe_layers():
        return list(completions)
    group = len(completions) // len(prompts)
    read = [
        [*prompts[at // group], *one.tokens][:-1]  # nothing follows the last token
        for at, one in enumerate(completions)
    ]
    done: list[Completion] = []
    for start in range(0, len(read), ROWS):
        rows = read[start : start + ROWS]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        real = torch.arange(width, device=device) < lengths[:, None]
        found = routes_of(model, tokens, real).cpu()
        done += [
            replace(completions[start + i], routes=pack(found[i, : len(row)]))
            for i, row in enumerate(rows)
        ]  # fmt: skip
    return done
