"""The decoding step as a recording that the chip plays back: one call from the host instead of some twenty for each layer.

A recording repeats the same operators on the same tensors, so everything that changes stands in tensors at fixed places, tables and lengths
included, and shapes come in few sizes: rows and slots are rounded up to powers of two. What is rounded up is computed and thrown away.
A shape is recorded once it has been met often enough to pay for it; until then, and where recording fails, the same step runs operator by
operator. Nothing in the step may make the host wait: see model/experts.py.

Letters: B rows, M blocks of a row, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bascule.accelerators.base import Recorder
from bascule.infer.blocks import blocks_for
from bascule.model.pages import Pages, StandingCache
from bascule.model.transformer import Output, Transformer

RECORD_AFTER = 8
"""Steps of a shape before it is recorded. Recording runs the step twice and sets the recording up: some ten steps' time."""

LEAST_SLOTS = 64


@dataclass
class _Shape:
    """`given` [B, 2 + M]: token, tokens read, blocks of every row. The answers are where the last run, or the recording, left them."""

    given: Tensor
    width: int
    met: int = 0
    refused: bool = False
    replay: Callable[[], None] | None = None
    logits_BV: Tensor | None = None
    hidden_BD: Tensor | None = None


class RecordedDecoding:
    """Steps of `model` on `pages`. `trouble`: why a recording failed, empty while none did; steps go on without it."""

    def __init__(self, model: Transformer, pages: Pages, record: Recorder, *, length: int) -> None:
        self.trouble = ""
        self._model, self._pages, self._record, self._length = model, pages, record, length
        self._device = model.lm_head.weight.device
        self._shapes: dict[tuple[int, int], _Shape] = {}

    @property
    def recordings(self) -> int:
        return sum(shape.replay is not None for shape in self._shapes.values())

    def step(
        self, tokens_B: Sequence[int], tables_BM: NDArray[np.int64], read_B: NDArray[np.int64], width: int | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As Runner.step. `width`: how many slots to read, rows then stay as many as they are (the reproducible mode's shapes)."""
        rows = len(tokens_B)
        least = max(LEAST_SLOTS, int(read_B.max()) + 1)
        shape = self._shape(
            rows if width else _power_of_two(rows),
            width or min(_power_of_two(least), self._length),
        )
        given = np.zeros(shape.given.shape, dtype=np.int64)
        given[:rows, 0], given[:rows, 1] = tokens_B, read_B
        held = min(tables_BM.shape[1], given.shape[1] - 2)
        given[:rows, 2 : 2 + held] = tables_BM[:, :held]
        shape.given.copy_(torch.from_numpy(given))
        self._run(shape)
        assert shape.logits_BV is not None and shape.hidden_BD is not None
        # Copies: the next run of any shape may write over what a recording answered.
        return shape.logits_BV[:rows].clone(), shape.hidden_BD[:rows].clone()

    def _shape(self, rows: int, width: int) -> _Shape:
        if (rows, width) not in self._shapes:
            given = torch.zeros(rows, 2 + blocks_for(width), dtype=torch.int64, device=self._device)
            self._shapes[rows, width] = _Shape(given, width)
        return self._shapes[rows, width]

    def _run(self, shape: _Shape) -> None:
        shape.met += 1
        if shape.replay is None and shape.met > RECORD_AFTER and not shape.refused:
            try:
                shape.replay = self._record(lambda: self._compute(shape))
            except RuntimeError as error:
                shape.refused = True
                rows, _ = shape.given.shape
                self.trouble = f"a step of {rows} rows and {shape.width} slots could not be recorded: {error}"  # fmt: skip
        if shape.replay is None:
            self._compute(shape)
        else:
            shape.replay()

    def _compute(self, shape: _Shape) -> None:
        tokens_B, read_B, tables_BM = shape.given[:, 0], shape.given[:, 1], shape.given[:, 2:]
        cache = StandingCache(self._pages, tables_BM, read_B, width=shape.width)
        output: Output = self._model(tokens_B[:, None], cache=cache)
        shape.logits_BV, shape.hidden_BD = output.logits_BTV[:, 0], output.hidden_BTD[:, 0]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
