"""Which block of the paged cache belongs to whom: reference counts, and full blocks found again by what they hold.

A block is BLOCK tokens of every layer (`model/pages.py` has the numbers; no tensor here). Rows that begin alike share their full
blocks. A full block's key covers its own tokens and all before them, so equal keys mean equal prefixes. When nobody holds a
keyed block any more it stays findable until its space is wanted; the least recently let go goes first, and of one row its end:
a block without those before it could never be found again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from bascule.model.pages import BLOCK


class OutOfBlocks(Exception):
    """No block is free and none can be forgotten. The batch answers by preempting a row; nobody else sees this."""


class Blocks:
    """`count` blocks, numbered from 1: block 0 takes the padding. `queries` and `hits` count tokens, for the metrics."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.queries = 0
        self.hits = 0
        self._holders = [0] * (count + 1)
        self._free = list(range(count, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that can be taken now: those never used, and those kept only in case someone asks again."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """Blocks for one holder, contents undefined; all or none. Raises OutOfBlocks."""
        if count > self.free:
            raise OutOfBlocks
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._forget()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def find(self, text: Sequence[int]) -> list[int]:
        """The longest known prefix, shared with the caller. The last token is never taken from it: its logits are wanted."""
        found = []
        for key in _keys(text[:-1]):
            if key not in self._by_key:
                break
            found.append(self._by_key[key])
        self.share(found)
        self.queries += len(text)
        self.hits += len(found) * BLOCK
        return found

    def keep(self, text: Sequence[int], blocks: Sequence[int]) -> None:
        """Make the full blocks of a text that was read into `blocks` findable."""
        for key, block in zip(_keys(text), blocks, strict=False):
            if key not in self._by_key:
                self._by_key[key] = block
                self._key_of[block] = key

    def _forget(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._by_key[self._key_of.pop(block)]
        return block


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _keys(text: Sequence[int]) -> Iterator[bytes]:
    """One key for each full block, chained over the blocks before it."""
    key = b""
    for start in range(0, len(text) - BLOCK + 1, BLOCK):
        tokens = array("q", text[start : start + BLOCK]).tobytes()
        key = hashlib.blake2b(key + tokens, digest_size=16).digest()
        yield key
