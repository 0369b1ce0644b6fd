"""Pretraining: the next token of the user's own text, in packed windows (data/shards.py). B rows, T positions, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bascule.config.training import PretrainConfig
from bascule.data.shards import Order, Text
from bascule.model.transformer import Output
from bascule.train import schedule
from bascule.train.objective import Batch, FromText, ask_head

NATS_PER_BIT = math.log(2.0)


@dataclass(frozen=True)
class Reading:
    """A text, its windows' length, and how many bytes each token stands for."""

    text: Text
    length: int
    token_bytes: NDArray[np.int64]
    document_mask: bool = True

    def rows(self, starts: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of the windows that begin at `starts`; a window cut off by the end of the text is padded.

        A target counts (`mask`) when it belongs to the document of the token before it: the first token of a document cannot be
        foreseen. `target_bytes` is 0 for special tokens and for targets that do not count.
        """
        size = (len(starts), self.length + 1)
        full_BT, number_BT = np.zeros(size, np.int64), np.full(size, -1, np.int64)
        for row, start in enumerate(starts):
            found = self.text.tokens(start, self.length + 1)
            full_BT[row, : len(found)] = found
            number_BT[row, : len(found)] = self.text.documents(start, len(found))
        real_BT = number_BT[:, :-1] >= 0
        counts_BT = real_BT & (number_BT[:, 1:] == number_BT[:, :-1])
        targets_BT = full_BT[:, 1:]
        tensors = {
            "tokens": full_BT[:, :-1].copy(),
            "real": real_BT,
            "targets": targets_BT.copy(),
            "mask": counts_BT.astype(np.float32),
            "target_bytes": np.where(counts_BT, self.token_bytes[targets_BT], 0),
        }
        if self.document_mask:
            tensors["documents"] = number_BT[:, :-1].copy()
        return {name: torch.from_numpy(values) for name, values in tensors.items()}


class Pretrain(FromText[PretrainConfig]):
    """The phase's objective. It keeps no cursor: a batch is a function of (seed, step) alone.

    `rank` of `ranks` reads its share of every step's windows; together they read what one would.
    """

    phase = "pretrain"

    def __init__(
        self,
        config: PretrainConfig,
        reading: Reading,
        *,
        seed: int,
        first_step: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.config = config
        self.reading = reading
        self.seed = seed
        self.first_step = first_step
        self.steps = config.steps
        self.clip_grad_norm = config.clip_grad_norm
        self._share = (rank, ranks)

    @cached_property
    def order(self) -> Order:
        return Order(len(self.reading.text), self.reading.length, self.seed)

    def learning_rate(self, step: int) -> tuple[float, float]:
        config, index = self.config, step - self.first_step
        final, warmup = config.final_learning_rate_ratio, config.warmup_steps
        if config.schedule == "wsd":
            factor = schedule.wsd(
                index, config.steps, warmup=warmup, decay=config.decay_ratio, final=final
            )
        else:
            factor = schedule.linear(index, config.steps, warmup=warmup, final=final)
        return factor, factor * config.learning_rate

    def next_batch(self, step: int) -> Batch:
        rank, ranks = self._share
        starts = self.order.share(
            step - self.first_step, self.config.batch_sequences, rank=rank, ranks=ranks
        )
        return Batch(self.phase, step, self.reading.rows(starts))

    def loss(self, output: Output, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return reading_loss(output, tensors)


def reading_loss(output: Output, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean nats of the targets that count, and bits per byte of those that are text."""
    nats_BT = -ask_head(output, tensors["targets"])[0]
    mask_BT, bytes_BT = tensors["mask"], tensors["target_bytes"]
    text_nats = (nats_BT.detach() * (bytes_BT > 0)).sum()
    metrics = {"bits_per_byte": text_nats / NATS_PER_BIT / bytes_BT.sum().clamp(min=1)}
    return (nats_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1.0), metrics


def measure(
    score: Callable[[Mapping[str, Tensor]], Tensor], reading: Reading, *, rows: int, windows: int
) -> dict[str, float]:
    """`bits_per_byte`, `nats_per_token`, `tokens` and `text_bytes` over the first `windows` windows of a text, end to end.

    `score` gives the log-probability of every target, (B,T) on the CPU (Stepper.score).
    """
    starts = list(range(0, max(1, len(reading.text) - 1), reading.length))[:windows]
    nats = text_nats = tokens = text_bytes = 0.0
    for at in range(0, len(starts), rows):
        tensors = reading.rows(starts[at : at + rows])
        nats_BT = -score(tensors).double()
        nats += float((nats_BT * tensors["mask"]).sum())
        text_nats += float((nats_BT * (tensors["target_bytes"] > 0)).sum())
        tokens += float(tensors["mask"].sum())
        text_bytes += float(tensors["target_bytes"].sum())
    return {
        "bits_per_byte": text_nats / NATS_PER_BIT / max(1.0, text_bytes),
        "nats_per_token": nats / max(1.0, tokens),
        "tokens": tokens,
        "text_bytes": text_bytes,
    }
