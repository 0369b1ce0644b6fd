"""The paged cache: one pool of blocks for all rows, and a view of some rows of it that attention takes for an ordinary cache.

A row's tokens lie in the blocks its table names, in order; block 0 belongs to nobody and takes what padding writes. A step gathers
the rows' blocks of one layer side by side. That copy is the price: measured in benchmarks/serve/paging.py. What it buys: memory
for the tokens there are instead of for the longest row, and prefixes shared by rows.

Letters: L layers, K key-value heads (1 for MLA), N blocks, E numbers a token and head, B rows, M blocks of a row, T tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bascule.config import ModelConfig
from bascule.model.cache import Cache

BLOCK = 16  # tokens


class Pages:
    """`pools` [L, K, N, BLOCK, E]: one for MLA (latent and turned key), keys and values for GQA. Memory is touched when first used."""

    def __init__(
        self, config: ModelConfig, blocks: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.latent = config.attention == "mla"
        heads, width = (
            (1, config.kv_lora_rank + config.qk_rope_head_dim)
            if self.latent
            else (config.num_key_value_heads, config.head_dim)
        )
        shape = (config.num_hidden_layers, heads, blocks + 1, BLOCK, width)
        self.pools = tuple(
            torch.empty(shape, device=device, dtype=dtype) for _ in range(1 if self.latent else 2)
        )
        self.block_bytes = sum(pool[:, :, 0].numel() * pool.element_size() for pool in self.pools)
        self.clean([0])

    def clean(self, blocks: Sequence[int]) -> None:
        """Zero blocks before their first use: slots past a row's end are masked when read, and a masked NaN is still a NaN."""
        if blocks:
            for pool in self.pools:
                pool[:, :, list(blocks)] = 0

    def copy(self, source: int, target: int) -> None:
        for pool in self.pools:
            pool[:, :, target] = pool[:, :, source]


class PagedCache(Cache):
    """Some rows of `pages` for one call of the model. `tables_BM` names each row's blocks, 0 where a row has fewer than M.

    `width` overrides how many slots a read returns (at least the longest row after the call): fixed shapes for equal bits.
    """

    def __init__(
        self, pages: Pages, tables_BM: Tensor, lengths_B: Tensor, longest: int, *, ragged: bool, width: int | None = None
    ) -> None:  # fmt: skip
        self.buffers = pages.pools
        self.capacity = tables_BM.shape[1] * BLOCK
        self.lengths_B, self.longest = lengths_B, longest
        self.ragged = ragged or width is not None
        self._latent, self._tables_BM, self._width = pages.latent, tables_BM, width
        self._at_BT = tables_BM

    def open(self, tokens: int, *, ragged: bool) -> Tensor:
        positions_BT = super().open(tokens, ragged=ragged)
        # Padding may lie past the last block of a short row's table: it goes to block 0.
        block_BT = positions_BT // BLOCK
        held_BT = self._tables_BM.gather(1, block_BT.clamp(max=self._tables_BM.shape[1] - 1))
        self._at_BT = held_BT * BLOCK + positions_BT % BLOCK
        if self._width is not None:
            self.longest = self._width
        return positions_BT

    def write(self, layer: int, *values: Tensor) -> None:
        at = self._at_BT.flatten()
        for pool, value in zip(self.buffers, values, strict=True):
            heads_KTE = value.reshape(at.numel(), pool.shape[1], -1).transpose(0, 1)
            pool[layer].flatten(1, 2).index_copy_(1, at, heads_KTE.to(pool.dtype))

    def read(self, layer: int) -> tuple[Tensor, ...]:
        """[B, S, E] for MLA; [B, S, K, E] for GQA, head by head in memory."""
        batch, blocks = self._tables_BM.shape[0], self._tables_BM.flatten()
        parts = []
        for pool in self.buffers:
            found = pool[layer].index_select(1, blocks)
            side_by_side = found.view(pool.shape[1], batch, -1, pool.shape[-1])[
                :, :, : self.longest
            ]
            parts.append(side_by_side[0] if self._latent else side_by_side.permute(1, 2, 0, 3))
        return tuple(parts)
