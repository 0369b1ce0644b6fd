"""The bits and the lengths of tensors that nobody may write to between two updates: the guard's passes over all weights.

One integer per tensor that changes when any bit of it flips: the sum of its words, exact. On a CPU both come from one pass over memory
(bits.cpp), because such a pass over the weights is what the guard costs on steps that nobody watches; without a compiler, on another chip
or in another type they take one pass each, in PyTorch.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bascule import native

SOURCE = Path(__file__).with_name("bits.cpp")


class Survey:
    """Of the same tensors, again and again: their addresses are looked up once, which takes longer than adding up a small model."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._at = torch.tensor(self._places, dtype=torch.int64)
        self._counts = torch.tensor([t.numel() for t in self._tensors], dtype=torch.int64)
        dense = all(t.is_contiguous() for t in self._tensors)
        fast = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in self._tensors)
        self._library = compiled() if dense and fast and self._tensors else None
        # words of one that does not lie dense would be a copy, which never changes
        self._words = [words(t) for t in self._tensors] if dense and not self._library else None

    def still_of(self, tensors: Sequence[Tensor]) -> bool:
        """Do these lie where those of the first look lay?"""
        return [tensor.data_ptr() for tensor in tensors] == self._places

    @torch.no_grad()
    def look(self) -> tuple[Tensor, Tensor]:
        """((P,) words added up, (P,) 2-norms), on the chip and without a wait."""
        if self._library is None:
            views = [words(t) for t in self._tensors] if self._words is None else self._words
            return word_sums(views), lengths(self._tensors)
        bits, squares = torch.empty_like(self._at), torch.empty(len(self._at), dtype=torch.float64)
        addresses = (x.data_ptr() for x in (self._at, self._counts))
        self._library.survey(*addresses, len(self._at), bits.data_ptr(), squares.data_ptr())
        return bits, squares.sqrt_()


@cache
def compiled() -> ctypes.CDLL | None:
    library = native.build(SOURCE).library
    if library is not None:
        pointer = ctypes.c_void_p
        library.survey.argtypes = [pointer, pointer, ctypes.c_long, pointer, pointer]
        library.survey.restype = None
    return library


def why_not() -> str:
    """Why there is nothing compiled, "" where there is."""
    return native.build(SOURCE).why


@torch.no_grad()
def lengths(tensors: Sequence[Tensor]) -> Tensor:
    """(P,) 2-norms, in one call and without a wait."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))])


@torch.no_grad()
def bit_sums(tensors: Iterable[Tensor]) -> Tensor:
    """(P,) words of each added up. Other numbers than a `Survey`'s where a tensor has an odd number of values; hold like against like."""
    return word_sums([words(tensor) for tensor in tensors])


def word_sums(views: Iterable[Tensor]) -> Tensor:
    return torch.stack([view.sum(dtype=torch.int64) for view in views])


def words(tensor: Tensor) -> Tensor:
    """The same bytes as integers: 8 at a time where they allow it, because sums of 64-bit words need no conversion."""
    flat = tensor.detach().reshape(-1)
    size = flat.element_size()
    if flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return flat.view(torch.int64)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


def changed(before: Tensor, now: Tensor, names: Sequence[str]) -> str | None:
    """The first tensor whose bits are not those of `before` any more, though nothing should have written to it."""
    return None if torch.equal(before, now) else names[int(before.ne(now).nonzero()[0])]


class Kept:
    """The bits of tensors that nobody may write to until the next commit. Holds the tensors, so that a new phase's optimizer cannot
    come to lie where the old one's was and be taken for it."""

    def __init__(self, tensors: Mapping[str, Tensor], before: Kept | None) -> None:
        self._names, self._tensors = list(tensors), list(tensors.values())
        same = before is not None and before._are(self._tensors)
        self._words: list[Tensor] = (
            before._words if before and same else [words(t) for t in self._tensors]
        )
        self._bits = word_sums(self._words) if self._words else None

    def rotten(self, now: Mapping[str, Tensor]) -> str | None:
        """The tensor whose bits changed, or None; also where these are other tensors by now."""
        if self._bits is None or not self._are(list(now.values())):
            return None
        return changed(self._bits, word_sums(self._words), self._names)

    def _are(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
