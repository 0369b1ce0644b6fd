"""From the logits of a step to what each row says, and when it ends. B rows, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bascule.errors import NonFiniteLogits
from bascule.infer.row import Row
from bascule.infer.sampling import Knobs, choose, edits

HOST = torch.device("cpu")


def speak(rows: Sequence[Row], logits_BV: Tensor, knobs: Knobs, eos_id: int) -> None:
    """One more token for every row. Sampled on the host, whatever the chip: the cumulative sum has no deterministic kernel on
    CUDA, and a chip that computes wrong logits should not also be trusted to choose. The price is one copy of the logits a step.
    """
    logits_BV = logits_BV.to(HOST)
    tokens_B, logprobs_B = draw(rows, logits_BV, knobs)
    if any(row.top is not None for row in rows):
        _note_top(rows, logits_BV, tokens_B)
    note(rows, tokens_B.tolist(), logprobs_B.tolist(), eos_id)


def note(rows: Sequence[Row], tokens: Sequence[int], logprobs: Sequence[float], eos_id: int) -> None:  # fmt: skip
    """What was drawn becomes what the rows said."""
    for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
        row.said.append(token)
        row.logprobs.append(logprob)
        if token == eos_id:
            row.finish = "stop"
        elif len(row.said) >= row.sampling.max_tokens:
            row.finish = "length"
        if row.constraint is not None:
            row.constraint.take(token)
            row.trouble = row.constraint.trouble()
            row.finish = "form" if row.trouble else row.finish


def alike(row: Row) -> bool:
    """Does what it says next depend on its logits and its random number alone, and is no more asked of it?"""
    return row.constraint is None and row.top is None and not row.sampling.edits_logits


def draw(
    rows: Sequence[Row], logits_BV: Tensor, knobs: Knobs, *, ahead: int = 0
) -> tuple[Tensor, Tensor]:
    """What each row would say next and its log-probability, with the row's own random number, edits and grammar. Nothing is noted.

    The last `ahead` rows, which must be `alike`, draw the token after the next one.
    """
    if not math.isfinite(logits_BV.sum()):
        _refuse(rows, logits_BV)
    uniform = [0.0] * len(rows)
    if not knobs.all_greedy:
        first = len(rows) - ahead
        uniform = [row.draws.at(len(row.said) + (at >= first)) for at, row in enumerate(rows)]
    settings, said = [row.sampling for row in rows], [row.said for row in rows]
    extra = _forbid(rows, logits_BV, edits(settings, said, logits_BV.shape[1], HOST))
    return choose(logits_BV, knobs, uniform, extra)


def suppose(rows: Sequence[Row], logits_BV: Tensor, knobs: Knobs) -> list[int]:
    """What `draw` would say, up to rounding, for a guess, which is compared with what is drawn later: a third of the time, in numpy, where
    every row is `alike` and nothing is cut off."""
    if knobs.cuts or not all(map(alike, rows)):
        return draw(rows, logits_BV, knobs)[0].tolist()  # type: ignore[no-any-return]
    plain_BV = logits_BV.numpy()
    best_B = plain_BV.argmax(1)
    if knobs.all_greedy:
        return best_B.tolist()  # type: ignore[no-any-return]
    scaled_BV = (
        plain_BV if knobs.temperature_B1 is None else plain_BV / knobs.temperature_B1.numpy()
    )
    sums_BV = np.exp(scaled_BV - scaled_BV.max(1, keepdims=True)).cumsum(1)
    target_B = np.array([row.draws.at(len(row.said)) for row in rows], np.float32) * sums_BV[:, -1]
    drawn_B = np.minimum((sums_BV <= target_B[:, None]).sum(1), sums_BV.shape[1] - 1)
    if knobs.greedy_B is not None:
        drawn_B = np.where(knobs.greedy_B.numpy(), best_B, drawn_B)
    return drawn_B.tolist()  # type: ignore[no-any-return]


def _note_top(rows: Sequence[Row], logits_BV: Tensor, tokens_B: Tensor) -> None:
    """For readers who ask: the chosen token first, then the `top` likeliest, under the model's own distribution (T=1)."""
    for row, logits_V, token in zip(rows, logits_BV, tokens_B.tolist(), strict=True):
        if row.top is not None:
            logprobs_V = torch.log_softmax(logits_V, dim=-1)
            best = logprobs_V.topk(row.top)
            ranked = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            row.tops.append([(token, float(logprobs_V[token])), *ranked])


def _forbid(rows: Sequence[Row], logits_BV: Tensor, extra_BV: Tensor | None) -> Tensor | None:
    """Minus infinity on what a row's grammar does not allow now."""
    for at, row in enumerate(rows):
        if row.constraint is not None:
            extra_BV = torch.zeros_like(logits_BV) if extra_BV is None else extra_BV
            extra_BV[at, ~torch.from_numpy(row.constraint.allowed())] = float("-inf")
    return extra_BV


def _refuse(rows: Sequence[Row], logits_BV: Tensor) -> None:
    bad = (~torch.isfinite(logits_BV)).any(dim=1)
    position = len(rows[int(bad.int().argmax())].said)
    raise NonFiniteLogits(
        f"The chip returned NaN or infinity among the logits of {int(bad.sum())} of {len(rows)} sequences (first at token {position} "
        "of a completion); logits must be finite. Nothing was sampled from them. Qualify the chip again before using it."
    )
