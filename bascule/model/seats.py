"""A batch without padding and without repetition: a flat row of tokens, each worked out once, that sits down in rows only to attend.

Samples of one prompt share its tokens: under causal attention what a prompt becomes does not depend on what follows it. So everything
between the attentions (nearly all of a small model's arithmetic) is done once a prompt and never for padding, and attention sees the rows
it always saw. Values and gradients are those of the padded batch up to the order in which sums over tokens are taken.

S rows (samples), T positions, N tokens that differ, D numbers a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bascule.model import fused, kernels

NAMES = ("seats", "places", "copies", "picks", "counted")
"""Tensors of a batch whose tokens are worked out once each: `Seats`'s two, how many samples each token stands for (N,), the tokens whose next
one counts (M,), and the places of those in the mask (s * T + t, M). Without them the batch is the padded one, to the same loss."""


@dataclass(frozen=True)
class Seats:
    """`token_ST`: which token sits in a place. Places behind a row's end hold any token: no real one looks there, nothing is read from
    there. `place_N` (s * T + t): from where each token takes what its attention gave; of several samples any will do."""

    token_ST: Tensor
    place_N: Tensor

    def spread(self, x_1ND: Tensor) -> Tensor:
        """[S, T, D]."""
        taken = take(x_1ND.flatten(0, 1), self.token_ST.flatten())
        return taken.view(*self.token_ST.shape, -1)

    def collect(self, x_STD: Tensor) -> Tensor:
        """[1, N, D]."""
        return take(x_STD.flatten(0, 1), self.place_N).unsqueeze(0)


def take(x_ND: Tensor, order_M: Tensor) -> Tensor:
    """Rows of x, [M, D]; the gradient of a row taken often is the sum."""
    if kernels.usable(x_ND):
        return fused.take_rows(x_ND, order_M)
    taken: Tensor = torch.index_select(x_ND, 0, order_M)
    return taken
