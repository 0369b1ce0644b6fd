"""From logits to the next token: temperature, top-k, top-p, min-p, penalties, and whose random number decides.

Each sequence owns its random numbers: token t of sequence i uses number `i * SPAN + t` of the key (seed, purpose, step), so
what a sequence says does not depend on which others share its batch, in which order, or on which chip they run. One uniform
number a token picks by inverse cumulative probability; that needs no generator state and resumes anywhere.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bascule import draws
from bascule.infer.sequence import SPAN, Sampling

__all__ = ["SPAN", "Draws", "Knobs", "Sampling", "choose", "edits"]
_CHUNK = 64  # positions drawn at once: one numpy call of 64 numbers costs as much as one of a single number


class Draws:
    """The uniform numbers of one sequence, fetched in chunks."""

    def __init__(self, sampling: Sampling, index: int) -> None:
        self._key = sampling.key
        self._base = index * SPAN
        self._start = -_CHUNK
        self._values: NDArray[np.float64] = np.empty(0)

    def at(self, position: int) -> float:
        offset = position - self._start
        if not 0 <= offset < _CHUNK:
            self._start, offset = position, 0
            self._values = draws.uniform(self._key, (_CHUNK,), start=self._base + position)
        return float(self._values[offset])


@dataclass(frozen=True)
class Knobs:
    """The settings of B rows as tensors, of one row where all share theirs; None where no row uses that setting, so the plain case pays nothing."""

    temperature_B1: Tensor | None
    greedy_B: Tensor | None
    all_greedy: bool
    top_k_B1: Tensor | None
    top_p_B1: Tensor | None
    min_p_B1: Tensor | None

    def of_rows(self, part: slice) -> Knobs:
        """Those of some rows."""

        def cut(values: Tensor | None) -> Tensor | None:
            return values if values is None or len(values) == 1 else values[part]

        return Knobs(
            cut(self.temperature_B1), cut(self.greedy_B), self.all_greedy, cut(self.top_k_B1), cut(self.top_p_B1), cut(self.min_p_B1)
        )  # fmt: skip

    @property
    def cuts(self) -> bool:
        """Does any row leave unlikely tokens out?"""
        return not (self.top_k_B1 is self.top_p_B1 is self.min_p_B1 is None)

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device) -> Knobs:
        def column(values: list[float], neutral: float) -> Tensor | None:
            if all(value == neutral for value in values):
                return None
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        rows = _distinct(rows)
        greedy = [row.temperature == 0 for row in rows]
        top_k = [row.top_k for row in rows]
        return cls(
            temperature_B1=column([row.temperature or 1.0 for row in rows], 1.0),
            greedy_B=torch.tensor(greedy, device=device) if any(greedy) else None,
            all_greedy=all(greedy),
            top_k_B1=torch.tensor(top_k, device=device)[:, None] if any(top_k) else None,
            top_p_B1=column([row.top_p for row in rows], 1.0),
            min_p_B1=column([row.min_p for row in rows], 0.0),
        )


TOGETHER = 2 << 20
"""Logits that are worked on at once. Larger blocks come fresh from the system at every call, a page fault for each 4 KiB."""


def choose(
    logits_BV: Tensor, knobs: Knobs, uniform_B: Sequence[float], edits_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pick one token a row; return tokens and their log-probabilities, both (B,).

    The log-probability is that of softmax(logits / temperature), before `edits_BV` (added to the logits: penalties, bias, -inf
    for what a grammar forbids) and before the cuts. A renormalised one would bias an importance ratio by the log of the mass
    that was cut away (vLLM RFC 42259).
    """
    most = max(1, TOGETHER // logits_BV.shape[1])
    if len(logits_BV) > most:
        return _in_parts(logits_BV, knobs, uniform_B, edits_BV, most)
    scaled_BV = logits_BV.float()
    if knobs.temperature_B1 is not None:
        scaled_BV = scaled_BV / knobs.temperature_B1
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    if edits_BV is None:
        source_BV = logprobs_BV
    else:
        edits_BV = edits_BV if knobs.temperature_B1 is None else edits_BV / knobs.temperature_B1
        source_BV = torch.log_softmax(scaled_BV + edits_BV, dim=-1)
    if knobs.all_greedy:
        tokens_B = source_BV.argmax(dim=-1)
    else:
        tokens_B = _inverse_cdf(_cut(source_BV.exp(), knobs), uniform_B)
        if knobs.greedy_B is not None:
            tokens_B = torch.where(knobs.greedy_B, source_BV.argmax(dim=-1), tokens_B)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


def _in_parts(
    logits_BV: Tensor, knobs: Knobs, uniform_B: Sequence[float], edits_BV: Tensor | None, most: int
) -> tuple[Tensor, Tensor]:
    """Some rows at a time, in memory that is still there from the rows before; a row's numbers are its own."""
    parts = [slice(at, at + most) for at in range(0, len(logits_BV), most)]
    chosen = [
        choose(logits_BV[part], knobs.of_rows(part), uniform_B[part], None if edits_BV is None else edits_BV[part])
        for part in parts
    ]  # fmt: skip
    return torch.cat([tokens for tokens, _ in chosen]), torch.cat([found for _, found in chosen])


def edits(
    rows: Sequence[Sampling], said: Sequence[Sequence[int]], vocab: int, device: torch.device
) -> Tensor | None:
    """What penalties and logit bias add to the logits, (B, V); None when no row asks. `said`: each row's completion so far."""
    if not any(row.edits_logits for row in _distinct(rows)):
        return None
    table = np.zeros((len(rows), vocab), dtype=np.float32)
    for line, row, tokens in zip(table, rows, said, strict=True):
        for token, bias in row.logit_bias:
            line[token] += bias
        if tokens and (row.presence_penalty or row.frequency_penalty):
            counts = np.bincount(np.asarray(tokens), minlength=vocab)[:vocab]
            line -= row.frequency_penalty * counts + row.presence_penalty * (counts > 0)
    return torch.from_numpy(table).to(device)


def _distinct(rows: Sequence[Sampling]) -> Sequence[Sampling]:
    """The first alone where all rows share it, as those of a rollout do: a step asks about every row."""
    return rows[:1] if rows and all(row is rows[0] for row in rows) else rows


def _cut(probs_BV: Tensor, knobs: Knobs) -> Tensor:
    """Set the probabilities that top-k, top-p and min-p exclude to 0. The most probable token always stays."""
    if knobs.min_p_B1 is not None:
        floor_B1 = knobs.min_p_B1 * probs_BV.amax(dim=-1, keepdim=True)
        probs_BV = probs_BV.masked_fill(probs_BV < floor_B1, 0.0)
    if knobs.top_k_B1 is None and knobs.top_p_B1 is None:
        return probs_BV
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    drop_BV = torch.zeros_like(sorted_BV, dtype=torch.bool)
    if knobs.top_k_B1 is not None:
        rank_V = torch.arange(sorted_BV.shape[1], device=sorted_BV.device)
        drop_BV |= (rank_V >= knobs.top_k_B1) & (knobs.top_k_B1 > 0)
    if knobs.top_p_B1 is not None:
        # top-p looks at what top-k left, renormalised, as in other engines; a token stays if the mass before it is under p
        kept_BV = sorted_BV.masked_fill(drop_BV, 0.0)
        kept_BV = kept_BV / kept_BV.sum(dim=-1, keepdim=True)
        before_BV = kept_BV.cumsum(dim=-1) - kept_BV
        drop_BV |= (before_BV >= knobs.top_p_B1) & (knobs.top_p_B1 < 1)
    drop_BV[:, 0] = False
    return probs_BV.masked_fill(torch.zeros_like(drop_BV).scatter(1, order_BV, drop_BV), 0.0)


def _inverse_cdf(weights_BV: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """The first token whose cumulative weight exceeds uniform * total: never one of weight 0, whatever the rounding. On the host."""
    cumulative_BV = weights_BV.cumsum(dim=-1)
    total_B = cumulative_BV[
        :, -1
    ].numpy()  # a call of numpy's costs a fifth of one of torch's, the bits are the same
    target_B = np.asarray(uniform_B, dtype=np.float32) * total_B
    # fp32 rounding may lift the target to the total itself; the step below the total keeps the index inside the weights
    target_B = np.minimum(target_B, np.nextafter(total_B, np.float32(0)))
    return torch.searchsorted(cumulative_BV, torch.from_numpy(target_B)[:, None], right=True)[:, 0]
