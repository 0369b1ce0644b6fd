"""Prompts that begin alike are read once: blocks of cached tokens, found again by the hash of everything up to their end.

A block's key covers its own tokens and all before them, so equal keys mean equal prefixes and a block can be reused whatever
follows. Blocks are copies and never change. When the budget is full the least recently used go first, and of one prompt its
end: a block without those before it could never be found again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from torch import Tensor

from bascule.model.cache import Cache

BLOCK = 16


class PrefixStore:
    """At most `budget_bytes` of blocks. `queries` and `hits` count tokens, for the metrics."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.queries = 0
        self.hits = 0
        self._blocks: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()

    def fill(self, prompt: Sequence[int], cache: Cache) -> int:
        """Copy the longest known prefix into row 0 of an empty `cache`; returns its tokens.

        The last token of a prompt is never taken from the store: its logits are what the first answer token is drawn from.
        """
        self.queries += len(prompt)
        known = 0
        found = []
        for key in _keys(prompt):
            block = self._blocks.get(key)
            if block is None or known + BLOCK >= len(prompt):
                break
            found.append(key)
            for buffer, part in zip(cache.buffers, block, strict=True):
                buffer[:, 0, known : known + BLOCK] = part
            known += BLOCK
        for key in reversed(found):
            self._blocks.move_to_end(key)
        self.hits += known
        cache.lengths_B = cache.lengths_B + known
        cache.longest = known
        return known

    def keep(self, prompt: Sequence[int], cache: Cache) -> None:
        """Store every whole block of a prompt that was read into row 0 of `cache`."""
        for number, key in reversed([*enumerate(_keys(prompt))]):
            if key in self._blocks:
                self._blocks.move_to_end(key)
                continue
            start = number * BLOCK
            block = tuple(buffer[:, 0, start : start + BLOCK].clone() for buffer in cache.buffers)
            self._blocks[key] = block
            self.used_bytes += _size(block)
        while self.used_bytes > self.budget_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self.used_bytes -= _size(oldest)

    def clear(self) -> None:
        self._blocks.clear()
        self.used_bytes = 0


def _keys(prompt: Sequence[int]) -> Iterator[bytes]:
    """One key for each whole block, chained over the blocks before it."""
    key = b""
    for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
        key = hashlib.blake2b(
            key + array("q", prompt[start : start + BLOCK]).tobytes(), digest_size=16
        ).digest()
        yield key


def _size(block: Sequence[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in block)
