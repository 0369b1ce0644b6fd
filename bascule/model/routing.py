"""Which experts each token went to: recorded on one chip, replayed on another (R3, arXiv 2510.11370).

Two chips that round differently choose different experts for a few tokens, and those tokens' log-probabilities then differ by far
more than rounding. Replaying the engine's choice in the trainer leaves the weights of the experts to the trainer, so its gradient
flows as before. Forward hooks do it: the model is left as it was. B rows, T tokens, L expert layers of the trunk, K experts a token.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bascule.model.moe import Router
from bascule.model.transformer import Transformer


def pack(chosen_TLK: Tensor) -> str:
    """Choices of one sequence as text."""
    return base64.b64encode(chosen_TLK.numpy().astype(np.uint16).tobytes()).decode()


def unpack(routes: str, tokens: int) -> NDArray[np.uint16]:
    """(T, L*K) of what `pack` wrote; `tokens` is T."""
    return np.frombuffer(base64.b64decode(routes), np.uint16).reshape(tokens, -1)


@contextmanager
def recording(model: Transformer) -> Iterator[list[Tensor]]:
    """Collects the choice [B*T, K] of every expert layer that runs inside."""
    heard: list[Tensor] = []

    def hear(gate: nn.Module, given: tuple[Tensor, ...], gave: tuple[Tensor, Tensor]) -> None:
        heard.append(gave[0])

    handles = [gate.register_forward_hook(hear) for gate in _gates(model)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(model: Transformer, routes_BTC: Tensor) -> Iterator[list[Tensor]]:
    """Inside, every router chooses as `routes_BTC` says, C = L*K. Collects for each layer which tokens would have chosen so by themselves,
    [B*T] bool."""
    agreed: list[Tensor] = []
    handles = []
    gates = _gates(model)
    routes_BTLK = torch.unflatten(routes_BTC.long(), -1, (len(gates), -1))
    for layer, gate in enumerate(gates):
        chosen_NK = routes_BTLK[:, :, layer].flatten(0, 1)

        def replay(
            gate: Router,
            given: tuple[Tensor, ...],
            gave: tuple[Tensor, Tensor],
            chosen_NK: Tensor = chosen_NK,
        ) -> tuple[Tensor, Tensor]:
            agreed.append((gave[0].sort(-1).values == chosen_NK.sort(-1).values).all(-1))
            return chosen_NK, gate.weigh(gate.scores(given[0]), chosen_NK)

        handles.append(gate.register_forward_hook(replay))
    try:
        yield agreed
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def routes_of(model: Transformer, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
    """The model's own choices for whole sequences, (B,T,L,K)."""
    with recording(model) as heard:
        model(tokens_BT, mask=real_BT)
    return torch.stack([one.view(*tokens_BT.shape, -1) for one in heard], 2)


def _gates(model: Transformer) -> list[Router]:
    """Of the trunk only: the prediction layer is not sampled from."""
    layers = model.moe_layers()
    return [moe.gate for moe in layers[: len(layers) - (len(model.mtp) if layers else 0)]]
