"""How the model is called: whole prompts together, one prompt in chunks, or one token for every row.

`native`: one token for every row is one call of compiled code (decoder.py), whose rows do not depend on each other. `record`: it is a
recording that the chip plays (recorded.py).

`fixed` is the reproducible mode. In torch a product's bits depend on its shape (how many rows share the call), so every step is
made of calls of one shape: TILE rows, missing ones filled up, and as many slots as the row's own length rounds up to. Then a row's
bits depend on that row alone. Prompts are read one by one, in chunks counted from their start. Experts that are called with the tokens that chose
them have no fixed shape; models with such layers run row by row. What it costs: benchmarks/serve/reproducible.py.

Letters: B rows, M blocks of a row, T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bascule.accelerators.base import Recorder
from bascule.infer.blocks import blocks_for
from bascule.infer.compiled import compiled
from bascule.infer.decoder import Decoder
from bascule.infer.draft import Drafter
from bascule.infer.linear import Precision, lay_out
from bascule.infer.packed import pack, packable
from bascule.infer.recorded import RecordedDecoding
from bascule.model.pages import PagedCache, Pages
from bascule.model.transformer import Output, Transformer

TILE = 8
LEAST_SLOTS = 64


class Runner:
    """One model and its pages. The weights must stay as they are while it lives: they are packed or laid out once, here."""

    def __init__(
        self,
        model: Transformer,
        blocks: int,
        *,
        length: int,
        pad_id: int,
        fixed: bool = False,
        precision: Precision = "fp32",
        speculate: bool = False,
        native: bool = False,
        record: Recorder | None = None,
    ) -> None:
        weight = model.lm_head.weight
        self.device = weight.device
        self.pages = Pages(model.config, blocks, self.device, weight.dtype)
        self.fixed = fixed
        self._length, self._pad_id = length, pad_id
        plain = self.device.type == "cpu" and weight.dtype == torch.float32 and precision != "bf16"
        native = native and plain and compiled() is not None
        self._packed = None if native else pack(model)
        self.reader = model if packable(model) else lay_out(model, precision, native=native)
        self.precision: Precision = "fp32" if self.reader is model else precision
        self.drafter = (
            Drafter(self.reader, self._packed, blocks) if speculate and model.mtp else None
        )
        self.decoder: Decoder | None = None
        if native:
            ahead = None if self.drafter is None else self.drafter.pages
            self.decoder = Decoder(self.reader, self.pages, ahead)
            if self.drafter is not None:
                self.drafter.decoder = self.decoder
        self.recorded: RecordedDecoding | None = None
        if record is not None and self._packed is None and self.decoder is None:
            self.recorded = RecordedDecoding(self.reader, self.pages, record, length=length)
        self._tile = 1 if self._packed is None and model.moe_layers() else TILE

    def read_together(
        self, texts: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Whole texts into their blocks; the logits after each, (B, V), and the hidden state that made them, (B, D)."""
        longest = max(map(len, texts))
        tokens = [[*text, *[self._pad_id] * (longest - len(text))] for text in texts]
        lengths_B = torch.tensor([len(text) for text in texts], device=self.device)
        table = np.zeros((len(texts), blocks_for(longest)), dtype=np.int64)
        for line, blocks in zip(table, tables, strict=True):
            line[: len(blocks)] = blocks
        cache = PagedCache(self.pages, table, np.zeros(len(texts), dtype=np.int64))
        ragged = len(set(map(len, texts))) > 1
        mask_BT = torch.arange(longest, device=self.device) < lengths_B[:, None] if ragged else None
        tokens_BT = torch.tensor(tokens, device=self.device)
        output: Output = self.reader(
            tokens_BT, mask=mask_BT, cache=cache, at_B=lengths_B - 1, every=self.drafter is not None
        )
        if self.drafter is None:
            return output.logits_BTV[:, 0], output.hidden_BTD[:, 0]
        self.drafter.read_together(tokens_BT, output.hidden_BTD, mask_BT, table)
        ends_BD = output.hidden_BTD[torch.arange(len(texts), device=self.device), lengths_B - 1]
        return output.logits_BTV[:, 0], ends_BD

    def read_on(
        self,
        chunk: Sequence[int],
        blocks: Sequence[int],
        known: int,
        before_1D: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One row's next tokens after its first `known`, whose last had the hidden state `before_1D` (None: they are a known
        prefix, or none); logits and hidden state after the last, (1, V) and (1, D)."""
        cache = PagedCache(self.pages, np.array([blocks]), np.array([known]))
        tokens_1T = torch.tensor([list(chunk)], device=self.device)
        last_1 = torch.tensor([len(chunk) - 1], device=self.device)
        output: Output = self.reader(
            tokens_1T, cache=cache, at_B=last_1, every=self.drafter is not None
        )
        if self.drafter is not None:
            self.drafter.read_on(tokens_1T, output.hidden_BTD, blocks, known, before_1D)
        return output.logits_BTV[:, 0], output.hidden_BTD[:, -1]

    def step(
        self, tokens_B: Sequence[int], tables_BM: NDArray[np.int64], read_B: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """One more token for every row, which has `read_B` tokens in its blocks; the logits after it, (B, V), and the hidden
        state, (B, D). A row may follow another of the same blocks, one token further."""
        if self.decoder is not None:
            return self.decoder.step(tokens_B, tables_BM, read_B)
        if not self.fixed:
            return self._step(tokens_B, tables_BM, read_B)
        logits_BV: Tensor | None = None
        hidden_BD: Tensor | None = None
        for rows, width in self._tiles(read_B):
            filled = [*rows, *[rows[0]] * (self._tile - len(rows))]
            tables = tables_BM[filled]
            tables[len(rows) :] = (
                0  # what fills the tile up writes to the block that belongs to nobody
            )
            part_BV, part_BD = self._step(
                [tokens_B[row] for row in filled], tables, read_B[filled], width
            )
            if logits_BV is None or hidden_BD is None:
                logits_BV = part_BV.new_empty(len(read_B), part_BV.shape[1])
                hidden_BD = part_BD.new_empty(len(read_B), part_BD.shape[1])
            logits_BV[rows], hidden_BD[rows] = part_BV[: len(rows)], part_BD[: len(rows)]
        assert logits_BV is not None and hidden_BD is not None
        return logits_BV, hidden_BD

    def _step(
        self,
        tokens_B: Sequence[int],
        tables_BM: NDArray[np.int64],
        read_B: NDArray[np.int64],
        width: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.recorded is not None:
            return self.recorded.step(tokens_B, tables_BM, read_B, width)
        tokens = torch.tensor(tokens_B, device=self.device)
        if width is not None:
            tables_BM = tables_BM[:, : blocks_for(width)]
        cache = PagedCache(self.pages, tables_BM, read_B, width=width)
        if self._packed is not None:
            logits_BV, unit_BD = self._packed.step(tokens, cache)
            gain_D = self.reader.model.norm.weight
            return logits_BV, unit_BD if self.drafter is None else unit_BD * gain_D
        output: Output = self.reader(tokens[:, None], cache=cache)
        return output.logits_BTV[:, 0], output.hidden_BTD[:, 0]

    def _tiles(self, read_B: NDArray[np.int64]) -> Iterator[tuple[list[int], int]]:
        """Rows that share a call, and the slots it reads: a power of two, whatever else is running."""
        by_width: dict[int, list[int]] = {}
        for row, read in enumerate(read_B.tolist()):
            width = max(LEAST_SLOTS, 1 << read.bit_length())
            by_width.setdefault(min(width, self._length), []).append(row)
        # Narrow ones first: a guess is never narrower than its row, whose token has to be written before the guess looks back.
        for width, rows in sorted(by_width.items()):
            for start in range(0, len(rows), self._tile):
                yield rows[start : start + self._tile], width
