"""Tokens come as often as their probabilities say, and never where a cut forbids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from bascule import draws
from bascule.errors import UsageError
from bascule.infer.sampling import SPAN, Draws, Knobs, Sampling, choose, edits

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, float("-inf"), 3.0])
ROWS = 20_000


def shares(sampling: Sampling, logits: torch.Tensor = LOGITS) -> np.ndarray:
    """How often each token is chosen over many independent rows."""
    uniform = draws.uniform(7, (ROWS,))
    tokens, _ = choose(logits.expand(ROWS, -1), Knobs.of([sampling] * ROWS, CPU), uniform.tolist())
    return np.bincount(tokens.numpy(), minlength=len(logits)) / ROWS


def expected(temperature: float, keep: Sequence[int]) -> np.ndarray:
    weights = torch.softmax(LOGITS / temperature, -1).double().numpy()
    kept = np.zeros_like(weights)
    kept[list(keep)] = weights[list(keep)]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("sampling", "keep"),
    [
        (Sampling(), range(7)),
        (Sampling(temperature=0.5), range(7)),
        (Sampling(temperature=2.0, top_k=3), (6, 0, 1)),
        (
            Sampling(top_p=0.8),
            (6, 0),
        ),  # 0.58 + 0.21 = 0.80 less a little: the third is not needed only above 0.797
        (Sampling(min_p=0.1), (6, 0, 1)),
        (Sampling(top_k=1), (6,)),
        (Sampling(top_p=0.0), (6,)),
        (Sampling(temperature=0.0), (6,)),
    ],
)
def test_tokens_come_as_often_as_their_probabilities_say(
    sampling: Sampling, keep: Sequence[int]
) -> None:
    temperature = sampling.temperature or 1.0
    if sampling.top_p == 0.8:
        probabilities = torch.softmax(LOGITS, -1).sort(descending=True).values
        keep = (
            torch.softmax(LOGITS, -1)
            .argsort(descending=True)[: int((probabilities.cumsum(-1) < 0.8).sum()) + 1]
            .tolist()
        )
    found, wanted = shares(sampling), expected(temperature, keep)
    assert (found[wanted == 0] == 0).all()
    assert np.abs(found - wanted).max() < 4 * 0.5 / np.sqrt(ROWS)


def test_a_token_of_probability_zero_is_never_chosen_at_the_edges() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(4, -1)
    tokens, _ = choose(
        logits, Knobs.of([Sampling()] * 4, CPU), [2.0**-54, 0.5 - 2.0**-30, 0.5, 1 - 2.0**-54]
    )
    assert set(tokens.tolist()) <= {1, 3}


def test_logprobs_are_those_before_cuts_and_edits() -> None:
    sampling = Sampling(temperature=0.5, top_k=2, logit_bias=((0, 50.0),))
    extra = edits([sampling], [[]], len(LOGITS), CPU)
    tokens, logprobs = choose(LOGITS[None], Knobs.of([sampling], CPU), [0.9], extra)
    assert tokens.item() == 0
    assert logprobs.item() == pytest.approx(torch.log_softmax(LOGITS / 0.5, -1)[0].item())


def test_rows_of_different_settings_do_not_touch_each_other() -> None:
    settings = [
        Sampling(),
        Sampling(temperature=0.0),
        Sampling(top_k=1),
        Sampling(top_p=0.5),
        Sampling(min_p=0.9),
        Sampling(temperature=3.0),
    ]
    uniform = [0.3] * len(settings)
    together, _ = choose(LOGITS.expand(len(settings), -1), Knobs.of(settings, CPU), uniform)
    alone = [choose(LOGITS[None], Knobs.of([one], CPU), [0.3])[0].item() for one in settings]
    assert together.tolist() == alone and len(set(alone)) > 1


def test_penalties_count_what_was_said() -> None:
    rows = [Sampling(presence_penalty=1.0, frequency_penalty=0.5), Sampling()]
    found = edits(rows, [[2, 2, 4], [1]], 6, CPU)
    assert found is not None
    assert found.tolist() == [[0, 0, -2.0, 0, -1.5, 0], [0] * 6]
    assert edits([Sampling()], [[1]], 6, CPU) is None


def test_the_numbers_of_a_sequence_depend_on_its_index_and_position_alone() -> None:
    sampling = Sampling(seed=3, step=5, purpose="x")
    whole = [Draws(sampling, 2).at(position) for position in range(200)]
    jumping = Draws(sampling, 2)
    assert [jumping.at(position) for position in (150, 0, 199, 64, 63)] == [
        whole[at] for at in (150, 0, 199, 64, 63)
    ]
    assert whole[0] == draws.uniform(sampling.key, (1,), start=2 * SPAN)[0]
    assert (
        Draws(sampling, 3).at(0)
        != whole[0]
        != Draws(Sampling(seed=4, step=5, purpose="x"), 2).at(0)
    )


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 1.5}, {"max_tokens": SPAN + 1}, {"top_k": -1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("alike", [True, False])
def test_rows_drawn_some_at_a_time_are_those_drawn_together(
    alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Sampling(temperature=0.7, top_k=9, top_p=0.9)
    rows = [one] * 7 if alike else [Sampling(temperature=t / 3, min_p=0.05 * t, top_k=t) for t in range(7)]  # fmt: skip
    logits_BV = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    edits_BV = torch.randn(7, 50, generator=torch.Generator().manual_seed(1))
    knobs, numbers = Knobs.of(rows, torch.device("cpu")), [at / 7 for at in range(7)]
    together = choose(logits_BV, knobs, numbers, edits_BV)
    monkeypatch.setattr("bascule.infer.sampling.TOGETHER", 100)
    in_parts = choose(logits_BV, knobs, numbers, edits_BV)
    assert all(torch.equal(a, b) for a, b in zip(together, in_parts, strict=True))
