"""Speculative decoding with the prediction layer: it guesses each row's next token, the trunk reads the guess along with the
token before it, and keeps it only when it would itself have said the same.

Which token the trunk says is a function of its logits and of the row's own random number for that position (sampling.py). So the test
is equality with the token drawn anyway, and the answer is the same tokens as without guesses, greedy or sampled; no rejection
sampling, no distribution to correct. The guess is drawn from the layer's logits with the same random number and settings, which makes
it agree more often. In the trunk's call a guess is one more row that names the same blocks, so the shapes and bits of the other
rows stay what they were.

The layer remembers pairs of its own: (hidden state of token t, token t+1), kept in slot t+1 of the row's blocks, because such a pair
depends on the tokens up to t+1 and so belongs to the same shared prefix as they do. Letters: B rows, M blocks, T tokens, D hidden,
N pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bascule.infer.decoder import Decoder
from bascule.infer.packed import PackedDecoder
from bascule.model.pages import BLOCK, PagedCache, Pages
from bascule.model.transformer import Transformer


class Drafter:
    """The prediction layer's pages, and the hidden state at the end of every full block: where a shared prefix ends, the next
    pair needs it."""

    def __init__(self, model: Transformer, packed: PackedDecoder | None, blocks: int) -> None:
        weight = model.lm_head.weight
        self.pages = Pages(model.config, blocks, weight.device, weight.dtype, layers=1)
        self.ends_ND = weight.new_empty(blocks + 1, model.config.hidden_size)
        self._model, self._packed = model, packed
        self.decoder: Decoder | None = None
        """The compiled one, which is made after these pages."""

    def read_together(
        self, tokens_BT: Tensor, hidden_BTD: Tensor, mask_BT: Tensor | None, tables_BM: NDArray[np.int64]
    ) -> None:  # fmt: skip
        """The pairs of whole texts; where `mask_BT` is false there is none."""
        if tokens_BT.shape[1] > 1:
            none = np.zeros(len(tables_BM), dtype=np.int64)
            cache = PagedCache(self.pages, tables_BM, none, first=1)
            mask = None if mask_BT is None else mask_BT[:, 1:]
            self._model.look_ahead(hidden_BTD[:, :-1], tokens_BT[:, 1:], mask=mask, cache=cache)

    def read_on(
        self, tokens_1T: Tensor, hidden_1TD: Tensor, blocks: Sequence[int], known: int, before_1D: Tensor | None
    ) -> None:  # fmt: skip
        """The pairs of one row's tokens `known`, `known + 1`, ..; `before_1D` is the hidden state of the token before them."""
        ends = list(range(-(known + 1) % BLOCK, tokens_1T.shape[1], BLOCK))
        self.ends_ND[[blocks[(known + end) // BLOCK] for end in ends]] = hidden_1TD[0, ends]
        if before_1D is None and known:
            before_1D = self.ends_ND[blocks[known // BLOCK - 1]].unsqueeze(0)
        if before_1D is None:
            earlier, tokens_1T = hidden_1TD[:, :-1], tokens_1T[:, 1:]
        else:
            earlier = torch.cat([before_1D.unsqueeze(0), hidden_1TD[:, :-1]], 1)
        if tokens_1T.shape[1]:
            pairs = np.array([max(known - 1, 0)])
            cache = PagedCache(self.pages, np.array([list(blocks)]), pairs, first=1)
            self._model.look_ahead(earlier, tokens_1T, cache=cache)

    def guess(
        self, hidden_ND: Tensor, tokens_N: Sequence[int], tables_NM: NDArray[np.int64], slots_N: NDArray[np.int64], last: Sequence[int]
    ) -> Tensor:  # fmt: skip
        """Add pairs, some of them of the same row; logits of what follows each pair that `last` names."""
        if self.decoder is not None:
            return self.decoder.draft(hidden_ND, tokens_N, tables_NM, slots_N, last)
        cache = PagedCache(self.pages, tables_NM, slots_N - 1, first=1)
        tokens = torch.tensor(tokens_N, device=hidden_ND.device)
        if self._packed is not None:
            return self._packed.draft(hidden_ND, tokens, cache, last)
        ahead_N1D, _ = self._model.look_ahead(hidden_ND[:, None], tokens[:, None], cache=cache)
        logits: Tensor = self._model.lm_head(ahead_N1D[last, 0])
        return logits.float()
