"""The paged cache: one pool of blocks for all rows, and a view of some rows of it that attention takes for an ordinary cache.

A row's tokens lie in the blocks its table names, in order; block 0 belongs to nobody and takes what padding writes. A step gathers
the rows' blocks of one layer side by side. That copy is the price: 15 to 20 % of a step of one row, nothing of a large batch's (docs/log.md). What it buys: memory
for the tokens there are instead of for the longest row, and prefixes shared by rows.

Letters: L layers, K key-value heads (1 for MLA), N blocks, E numbers a token and head, B rows, M blocks of a row, T tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bascule.config.model import ModelConfig
from bascule.model.cache import Cache

BLOCK = 16  # tokens
PART_BYTES = 2 << 20
DEVICE_PART_BYTES = 256 << 20
"""On the CPU what fits its cache; elsewhere the fewer calls the better, and this bounds the copy."""


class Pages:
    """`pools` [L, K, N, BLOCK, E]: one for MLA (latent and turned key), keys and values for GQA. Memory is touched when first used."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        layers: int | None = None,
    ) -> None:
        layers = config.num_hidden_layers if layers is None else layers
        self.latent = config.attention == "mla"
        heads, width = (
            (1, config.kv_lora_rank + config.qk_rope_head_dim)
            if self.latent
            else (config.num_key_value_heads, config.head_dim)
        )
        shape = (layers, heads, blocks + 1, BLOCK, width)
        self.pools = tuple(
            torch.empty(shape, device=device, dtype=dtype) for _ in range(1 if self.latent else 2)
        )
        self.blocks_KNA = [[layer.flatten(2) for layer in pool] for pool in self.pools]
        self.tokens_KSE = [[layer.flatten(1, 2) for layer in pool] for pool in self.pools]
        self.block_bytes = sum(pool[:, :, 0].numel() * pool.element_size() for pool in self.pools)
        self.token_layer_bytes = self.block_bytes // BLOCK // layers
        self._scratch = [torch.empty(0, device=device, dtype=dtype) for _ in self.pools]
        self.clean([0])

    def clean(self, blocks: Sequence[int]) -> None:
        """Zero blocks before their first use: slots past a row's end are masked when read, and a masked NaN is still a NaN."""
        if blocks:
            for pool in self.pools:
                pool[:, :, list(blocks)] = 0

    def copy(self, source: int, target: int) -> None:
        for pool in self.pools:
            pool[:, :, target] = pool[:, :, source]

    def gather(self, layer: int, tables_BM: Tensor) -> list[Tensor]:
        """Blocks side by side, [K, B, M * BLOCK, E] of each pool: on the CPU in a buffer that the next call writes over."""
        found = []
        blocks = tables_BM.flatten()
        for at, pool in enumerate(self.pools):
            heads, width = pool.shape[1], pool.shape[4]
            size = heads * blocks.numel() * BLOCK * width
            if pool.device.type != "cpu":  # its allocator keeps memory, and a recording its own
                out = self.blocks_KNA[at][layer].index_select(1, blocks)
            else:
                if (
                    self._scratch[at].numel() < size
                ):  # fresh memory for every call costs more than the copy itself
                    self._scratch[at] = self._scratch[at].new_empty(size)
                out = self._scratch[at][:size].view(heads, blocks.numel(), -1)
                torch.index_select(self.blocks_KNA[at][layer], 1, blocks, out=out)
            found.append(out.view(heads, tables_BM.shape[0], -1, width))
        return found


class PagedCache(Cache):
    """Some rows of `pages` for one call of the model. `tables_BM` names each row's blocks, 0 where a row has fewer than M;
    `read_B` is what each has read. Both lie on the host, and so does the arithmetic on them. The batch counts tokens, not `close`.

    `width` overrides how many slots a read returns (at least the longest row after the call): fixed shapes for equal bits.
    `first` is the slot of a row's first entry. The same blocks may be named by several rows: all write before any reads.
    """

    def __init__(
        self, pages: Pages, tables_BM: NDArray[np.int64], read_B: NDArray[np.int64], *, width: int | None = None, first: int = 0
    ) -> None:  # fmt: skip
        self._pages, self._tables, self._read, self._width = pages, tables_BM, read_B, width
        self._device = pages.pools[0].device
        self._first = first
        self.capacity = tables_BM.shape[1] * BLOCK - first
        self.longest = int(read_B.max())
        self.ragged = width is not None or int(read_B.min()) != self.longest
        self._tables_BM = torch.from_numpy(tables_BM).to(self._device)

    def open(self, tokens: int, *, ragged: bool) -> Tensor:
        positions_BT = self._read[:, None] + np.arange(tokens)
        # Padding may lie past the last block of a short row's table: it goes to block 0.
        slots_BT = positions_BT + self._first
        at_block = np.minimum(slots_BT // BLOCK, self._tables.shape[1] - 1)
        at_BT = np.take_along_axis(self._tables, at_block, 1) * BLOCK + slots_BT % BLOCK
        self._at = torch.from_numpy(at_BT.ravel()).to(self._device)
        self.longest = self._width or self.longest + tokens
        self.ragged = self.ragged or ragged
        return torch.from_numpy(positions_BT).to(self._device)

    def close(self, added_B: Tensor | int) -> None:
        pass

    def write(self, layer: int, *values: Tensor) -> None:
        for pool, value in zip(self._pages.tokens_KSE, values, strict=True):
            heads_KTE = value.view(self._at.numel(), pool[layer].shape[0], -1).transpose(0, 1)
            pool[layer].index_copy_(1, self._at, heads_KTE.to(pool[layer].dtype))

    def parts(self, layer: int) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """A few rows at a time, so that what was gathered is still in the CPU's cache when it is used."""
        rows = self._tables_BM.shape[0]
        bound = PART_BYTES if self._tables_BM.device.type == "cpu" else DEVICE_PART_BYTES
        step = max(1, bound // (self._pages.token_layer_bytes * self.capacity))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            found = self._pages.gather(layer, self._tables_BM[part])
            cut = [one[:, :, self._first : self._first + self.longest] for one in found]
            yield (
                part,
                (cut[0][0],)
                if self._pages.latent
                else tuple(one.permute(1, 2, 0, 3) for one in cut),
            )


class StandingCache(PagedCache):
    """One more token for rows whose tables and lengths stand on the chip, in tensors that every call reads anew: a recording of a step
    (infer/recorded.py) holds for whatever they say when it is played. `width` slots of every row are read, at least the longest after
    the call. A row of length 0 with block 0 alone is nobody's."""

    def __init__(self, pages: Pages, tables_BM: Tensor, read_B: Tensor, *, width: int) -> None:
        self._pages, self._tables_BM, self._read_B = pages, tables_BM, read_B
        self._first = 0
        self.capacity = tables_BM.shape[1] * BLOCK
        self.longest, self.ragged = width - 1, True

    def open(self, tokens: int, *, ragged: bool) -> Tensor:
        """Raises ValueError for more than one token."""
        if tokens != 1:
            raise ValueError(f"A standing cache takes one token a row and call, not {tokens}.")
        block_B1 = self._tables_BM.gather(1, self._read_B[:, None] // BLOCK)
        self._at = block_B1[:, 0] * BLOCK + self._read_B % BLOCK
        self.longest += 1
        return self._read_B[:, None]
