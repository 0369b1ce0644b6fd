"""What attention remembers between calls: preallocated buffers for a batch of rows of different lengths.

Rows are left-aligned: token t of a row lies in slot t, whatever the other rows hold. Slots past a row's length hold zeros or
stale numbers and are masked when read, so they must stay finite: that is why buffers start as zeros, never uninitialised.

Letters: L layers, B rows, S slots, T tokens of this call, C latent size, R rotary size, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bascule.config.model import ModelConfig
from bascule.model.seats import Seats


class Cache:
    """Rows of remembered tokens. `buffers` are [L, B, S, ...]; the subclasses say what a slot holds.

    `longest` is a host-side bound on the row lengths, so that a decode step reads only the used slots without asking the
    device. `ragged` turns true once rows may differ in length; while it is false reads need no mask.
    """

    def __init__(self, buffers: tuple[Tensor, ...]) -> None:
        self.buffers = buffers
        _, batch, self.capacity = buffers[0].shape[:3]
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=buffers[0].device)
        self.longest = 0
        self.ragged = False
        self._slots: tuple[Tensor, Tensor] | slice = slice(0, 0)

    @property
    def batch(self) -> int:
        return int(self.lengths_B.shape[0])

    def open(self, tokens: int, *, ragged: bool) -> Tensor:
        """Reserve the next `tokens` slots of every row; returns their positions [B, T]. Call `close` after the last layer.

        Raises ValueError when a row would outgrow the buffers.
        """
        if self.longest + tokens > self.capacity:
            raise ValueError(
                f"The cache was asked to append {tokens} tokens to rows of up to {self.longest}; it holds {self.capacity} a row. "
                "Make it with a larger `length`."
            )
        positions_BT = self.lengths_B[:, None] + torch.arange(tokens, device=self.lengths_B.device)
        if self.ragged:
            rows = torch.arange(self.batch, device=self.lengths_B.device)[:, None].expand_as(
                positions_BT
            )
            self._slots = (rows, positions_BT)
        else:
            self._slots = slice(self.longest, self.longest + tokens)
        self.longest += tokens
        self.ragged = self.ragged or ragged
        return positions_BT

    def close(self, added_B: Tensor | int) -> None:
        """Count the tokens that `open` reserved and that are real; the padding of a shorter prompt is not."""
        self.lengths_B = self.lengths_B + added_B

    def write(self, layer: int, *values: Tensor) -> None:
        """Store this call's tokens of one layer; each value is [B, T, ...] like a slot of its buffer."""
        for buffer, value in zip(self.buffers, values, strict=True):
            if isinstance(self._slots, slice):
                buffer[layer, :, self._slots] = value
            else:
                buffer[layer].index_put_(self._slots, value.to(buffer.dtype))

    def read(self, layer: int) -> tuple[Tensor, ...]:
        """The used slots of one layer, [B, longest, ...] each (views)."""
        return tuple(buffer[layer, :, : self.longest] for buffer in self.buffers)

    def parts(self, layer: int) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """What `read` returns, for some rows at a time; here for all at once."""
        yield slice(None), self.read(layer)

    def select(self, rows: Tensor) -> Self:
        """A new cache with the given rows in the given order: finished rows are left out, a row may come twice."""
        picked = type(self)(tuple(self._gather(buffer, rows) for buffer in self.buffers))
        picked.lengths_B = self.lengths_B[rows]
        picked.longest = int(picked.lengths_B.max()) if rows.numel() else 0
        picked.ragged = self.ragged
        return picked

    def repeat(self, times: int) -> Self:
        """A new cache with every row `times` over, copies side by side: the samples of a group share one prefill."""
        return self.select(
            torch.arange(self.batch, device=self.lengths_B.device).repeat_interleave(times)
        )

    def _gather(self, buffer: Tensor, rows: Tensor) -> Tensor:
        """Copy only the used slots; the rest of the new buffer is zeros."""
        shape = (buffer.shape[0], rows.numel(), *buffer.shape[2:])
        picked = torch.zeros(shape, dtype=buffer.dtype, device=buffer.device)
        picked[:, :, : self.longest] = buffer[:, :, : self.longest].index_select(1, rows)
        return picked

    @property
    def memory_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)


class LatentCache(Cache):
    """MLA: one buffer [L, B, S, C+R], the normed latent and the turned shared key. Keys and values are never expanded."""

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        layers: int,
        batch: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        return cls(
            (
                torch.zeros(
                    config.num_hidden_layers, batch, length, width, device=device, dtype=dtype
                ),
            )
        )


class KVCache(Cache):
    """GQA: keys and values, [L, B, S, K, E] each; keys are stored turned."""

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        layers: int,
        batch: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        shape = (
            layers,
            batch,
            length,
            config.num_key_value_heads,
            config.head_dim,
        )
        return cls(
            (
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
            )
        )


@dataclass(frozen=True)
class Context:
    """What all layers of one forward call share.

    `bias`: None for plain causal attention among this call's tokens; else additive, 0 or -inf, and broadcastable:
    [B, 1, T, T] for a call without cached tokens, [B, T, 1, S] (with `read`) for one that looks back into the cache.
    With `seats` the call's tokens are one flat row and attend in the rows that these name.
    """

    cos_BT1R: Tensor
    sin_BT1R: Tensor
    bias: Tensor | None = None
    cache: Cache | None = None
    read: bool = False
    seats: Seats | None = None
