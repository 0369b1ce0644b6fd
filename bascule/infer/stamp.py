"""The integrity stamp of an answer: what the model held in mind while it spoke, in few enough numbers to travel with the text.

In the manner of TOPLOC (Ong et al. 2025, arXiv 2501.16007): of every block of tokens, the largest entries of what the head read. Whoever has
the weights reads the text once, on any chip, and looks at the same places. Two things go beyond it: the log-probabilities are those of
the decoding itself, and the tokens are drawn again from our logits with the answer's own seed, because our random numbers are
functions of seed and position. What is allowed is rounding measured on this answer. T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bascule.infer.reference import MARGIN, Opinion, Reference
from bascule.infer.sampling import Draws, Knobs, Sampling, choose, edits
from bascule.model.transformer import Transformer

BLOCK_TOKENS = 32
PLACES = 24
REDRAWN_RATIO = 0.02  # of the tokens may be drawn differently: a random number can fall on the border between two tokens
DRAWN_FREELY = 1

Marks = list[list[tuple[int, float]]]
"""For every block of said tokens: (place in the block's T x D numbers, value) of the largest ones."""


@dataclass(frozen=True)
class Judged:
    """Worst relative error of the marks, worst difference of a log-probability, each with what is allowed; tokens drawn otherwise."""

    marks: float
    marks_bound: float
    logprobs: float
    logprobs_bound: float
    redrawn: int | None
    redrawn_bound: int

    @property
    def troubles(self) -> list[str]:
        found = []
        if not self.marks <= self.marks_bound:
            found.append(
                f"the activations are another model's or of another text: they differ by {self.marks:.1e}, {self.marks_bound:.1e} is allowed"
            )
        if not self.logprobs <= self.logprobs_bound:
            found.append(
                f"log-probabilities differ by {self.logprobs:.1e}, {self.logprobs_bound:.1e} is allowed"
            )
        if self.redrawn is not None and self.redrawn > self.redrawn_bound:
            found.append(
                f"{self.redrawn} tokens are not what this model draws with this seed, {self.redrawn_bound} are allowed"
            )
        return found


@torch.inference_mode()
def marks(model: Transformer, prompt: Sequence[int], said: Sequence[int]) -> Marks:
    """One reading of the finished text by the chip that wrote it."""
    tokens_1T = torch.tensor([[*prompt, *said]], device=model.lm_head.weight.device)
    hidden_TD = model(tokens_1T).hidden_BTD[0, len(prompt) - 1 : -1]
    return _largest(hidden_TD)


def judge(
    reference: Reference,
    opinion: Opinion,
    *,
    prompt: Sequence[int],
    said: Sequence[int],
    logprobs: Sequence[float],
    claimed: Marks,
    sampling: Sampling,
    choice: int,
    dtype: torch.dtype,
    drawn: bool,
) -> Judged:
    """`opinion` is what the judging chip says of prompt and answer together; `reference` measures what `dtype` may cost. `drawn`: no
    form bound the answer, so that its tokens can be drawn again."""
    text = [*prompt, *said]
    exact, coarse = reference.opinion(text, exact=True), reference.opinion(text, rounded_to=dtype)
    ours_T = _said_logprobs(opinion, prompt, said, sampling)
    floor_T = (
        _said_logprobs(exact, prompt, said, sampling)
        - _said_logprobs(coarse, prompt, said, sampling)
    ).abs()
    difference_T = (torch.tensor(logprobs, dtype=torch.float64) - ours_T).abs()
    start = len(prompt) - 1
    errors = _mark_errors(claimed, opinion.hidden_TD[start:-1])
    floors = _mark_errors(
        _at(_largest(exact.hidden_TD[start:-1]), coarse.hidden_TD[start:-1]),
        exact.hidden_TD[start:-1],
    )
    return Judged(
        marks=max(errors),
        marks_bound=MARGIN * max(floors),
        logprobs=float(difference_T.nan_to_num(nan=torch.inf).max()),
        logprobs_bound=MARGIN * max(float(floor_T.max()), 1e-6),
        redrawn=_redrawn((opinion, exact, coarse), prompt, said, sampling, choice)
        if drawn
        else None,
        redrawn_bound=DRAWN_FREELY + int(REDRAWN_RATIO * len(said)),
    )


def _said_logprobs(
    opinion: Opinion, prompt: Sequence[int], said: Sequence[int], sampling: Sampling
) -> Tensor:
    """At the temperature the answer was sampled with, as the engine notes them."""
    rows_TV = opinion.logprobs_TV[len(prompt) - 1 : -1] / (sampling.temperature or 1.0)
    return rows_TV.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]


def _mark_errors(claimed: Marks, hidden_TD: Tensor) -> list[float]:
    """Relative error of each block's marks; infinite where the stamp has other blocks than the text."""
    blocks = torch.split(hidden_TD.float().cpu(), BLOCK_TOKENS)
    if len(claimed) != len(blocks):
        return [float("inf")]
    found = []
    for block, pairs in zip(blocks, claimed, strict=True):
        flat = block.flatten()
        if not pairs or any(not 0 <= place < len(flat) for place, _ in pairs):
            return [float("inf")]
        ours = flat[[place for place, _ in pairs]].double()
        theirs = torch.tensor([value for _, value in pairs], dtype=torch.float64)
        # Places must be the largest ones too: small numbers of another model could lie near small numbers of ours.
        reached = float(ours.abs().min() / flat.abs().topk(min(PLACES, len(flat))).values[-1])
        error = float(((ours - theirs).square().sum() / ours.square().sum()).sqrt())
        found.append(
            error if reached > 0.9 and len(pairs) >= min(PLACES, len(flat)) else float("inf")
        )
    return found


def _largest(hidden_TD: Tensor) -> Marks:
    found: Marks = []
    for block in torch.split(hidden_TD.float().cpu(), BLOCK_TOKENS):
        flat = block.flatten()
        places = flat.abs().topk(min(PLACES, len(flat))).indices.tolist()
        found.append([(place, float(flat[place])) for place in places])
    return found


def _at(places: Marks, hidden_TD: Tensor) -> Marks:
    """The same places with the values of `hidden_TD`."""
    blocks = torch.split(hidden_TD.float(), BLOCK_TOKENS)
    return [
        [(place, float(block.flatten()[place])) for place, _ in pairs]
        for block, pairs in zip(blocks, places, strict=True)
    ]


def _redrawn(
    opinions: Sequence[Opinion], prompt: Sequence[int], said: Sequence[int], sampling: Sampling, choice: int
) -> int:  # fmt: skip
    """How many tokens the answer's own random numbers would have chosen differently, each after the same beginning, whatever rounding
    does. `opinions`: the judging chip's, the exact one, the coarse one. Tokens are chosen by where a number falls among cumulative
    probabilities, so rounding may move it by the distance between the exact and the coarse distribution."""
    ours_TV, exact_TV, coarse_TV = (
        one.logprobs_TV[len(prompt) - 1 : -1].float() for one in opinions
    )
    rows, said_T = [sampling] * len(said), torch.tensor(said)
    extra_TV = edits(rows, [said[:at] for at in range(len(said))], ours_TV.shape[1], said_T.device)
    if sampling.temperature == 0:
        edited_TV = ours_TV if extra_TV is None else ours_TV + extra_TV
        best_T2 = torch.stack([said_T, edited_TV.argmax(-1)], 1)
        lost_T = edited_TV.gather(1, best_T2).diff(dim=1)[:, 0]
        rounding_T = (exact_TV - coarse_TV).abs().gather(1, best_T2).sum(1)
        return int((lost_T > MARGIN * rounding_T).sum())
    exact_TV, coarse_TV = (
        torch.softmax(one / sampling.temperature, -1) for one in (exact_TV, coarse_TV)
    )
    shift_T = MARGIN * 0.5 * (exact_TV - coarse_TV).abs().sum(-1)
    draws = Draws(sampling, choice)
    uniform_T = torch.tensor([draws.at(at) for at in range(len(said))])
    knobs = Knobs.of(rows, said_T.device)
    first_T, last_T = (
        choose(ours_TV, knobs, (uniform_T + shift).clamp(0, 1).tolist(), extra_TV)[0]
        for shift in (-shift_T, shift_T)
    )
    return int(((said_T < first_T) | (said_T > last_T)).sum())


def settings(value: dict[str, Any]) -> Sampling:
    """A Sampling that travelled as JSON. Raises TypeError for keys it does not have."""
    bias = tuple((int(token), float(amount)) for token, amount in value.get("logit_bias", ()))
    return Sampling(**{**value, "logit_bias": bias})
