"""From the logits of a step to what each row says, and when it ends. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

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
    for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
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


def draw(rows: Sequence[Row], logits_BV: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor]:
    """What each row would say next and its log-probability, with the row's own random number, edits and grammar. Nothing is noted."""
    if not bool(torch.isfinite(logits_BV.sum())):
        _refuse(rows, logits_BV)
    uniform = (
        [0.0] * len(rows) if knobs.all_greedy else [row.draws.at(len(row.said)) for row in rows]
    )
    settings, said = [row.sampling for row in rows], [row.said for row in rows]
    extra = _forbid(rows, logits_BV, edits(settings, said, logits_BV.shape[1], HOST))
    return choose(logits_BV, knobs, uniform, extra)


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
