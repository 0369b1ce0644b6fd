"""Guesses change how fast an answer comes and nothing else: not its tokens, not its log-probabilities, whoever shares the batch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bascule.config.model import ModelConfig
from bascule.infer import decoder
from bascule.infer.batch import Batch
from bascule.infer.compiled import compiled
from bascule.infer.row import Row
from bascule.infer.sampling import Knobs, Sampling
from bascule.infer.speak import HOST, draw, suppose
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise

EOS, PAD, LENGTH = 2, 0, 128
SHAPES = {
    "packed": {"preset": "tick"},
    "grouped queries": {"preset": "tick", "attention": "gqa", "ffn": "swiglu"},
}
SETTINGS = [
    Sampling(max_tokens=40, temperature=0.0),
    Sampling(max_tokens=60, seed=2, temperature=0.7, top_p=0.9),
    Sampling(max_tokens=30, seed=1),
    Sampling(max_tokens=40, seed=3, top_k=5, presence_penalty=0.5, logit_bias=((7, 1.0),)),
    Sampling(max_tokens=1, seed=4),
    Sampling(max_tokens=2, seed=5),
]


@cache
@torch.inference_mode(mode=False)
def model_of(shape: str) -> Transformer:
    """Trained for a moment to count on in steps of its own, so that some guesses are right and some are not."""
    torch.manual_seed(0)
    config = ModelConfig(**SHAPES[shape], vocab_size=64, num_nextn_predict_layers=1)  # type: ignore[arg-type]
    model = Transformer(config)
    initialise(model, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    start = torch.arange(48)[:, None]
    tokens = 5 + (start + torch.arange(24) * (1 + start % 5)) % 59
    for _ in range(40):
        output = model(tokens, ahead=True)
        assert output.ahead_BTV is not None
        loss = F.cross_entropy(output.logits_BTV[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss = loss + F.cross_entropy(output.ahead_BTV[:, :-1].flatten(0, 1), tokens[:, 2:].flatten())  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


PLAIN = 20  # kinds from here on ask for nothing that needs a draw of its own


def row_of(kind: int) -> Row:
    prompt = [5 + (kind * 3 + at * (1 + kind % 5)) % 59 for at in range(3 + 9 * (kind % 5))]
    if kind >= PLAIN:
        return Row(prompt, SETTINGS[(0, 1, 2, 5)[kind % 4]], index=kind)
    return Row(prompt, SETTINGS[kind % len(SETTINGS)], index=kind, top=1 if kind % 2 else None)


def batch_of(
    shape: str, speculate: int, *, reproducible: bool, native: bool, tokens: int = 2048
) -> Batch:
    return Batch(
        model_of(shape), slots=12, length=LENGTH, eos_id=EOS, pad_id=PAD, tokens=tokens, share=True,
        reproducible=reproducible, speculate=speculate, native=native,
    )  # fmt: skip


@cache
def alone(shape: str, kind: int, native: bool) -> Row:
    row, batch = row_of(kind), batch_of(shape, 0, reproducible=True, native=native)
    batch.join([[row]])
    while batch.rows:
        batch.step()
    return row


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("first", [0, PLAIN])
@torch.inference_mode()
def test_answers_are_those_without_guesses(
    shape: str, reproducible: bool, native: bool, first: int
) -> None:
    rows = [row_of(first + kind) for kind in range(10)]
    batch = batch_of(shape, 10, reproducible=reproducible, native=native)
    batch.join([[row] for row in rows[:6]])
    batch.step()
    for row in rows[6:]:  # the others are read in chunks, after a prefix where one is known
        prefill = batch.prefill(row)
        while not prefill.done:
            prefill.advance(7)
        batch.enter([row], prefill)
    steps = 0
    while batch.rows:
        batch.step()
        steps += 1
    for kind, row in enumerate(rows, start=first):
        whole = alone(shape, kind, native)
        assert (row.said, row.finish) == (whole.said, whole.finish)
        assert row.logprobs == (whole.logprobs if reproducible else pytest.approx(whole.logprobs, abs=1e-4))  # fmt: skip
        assert len(row.tops) == (len(row.said) if row.top else 0)
    assert 0.2 * batch.guessed < batch.kept < batch.guessed
    assert steps < 50 and batch.blocks.free == batch.blocks.count


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@given(moves=st.lists(st.tuples(st.sampled_from(["add", "add", "step", "step", "abort"]), st.integers(0, 9) | st.integers(PLAIN, PLAIN + 9)), max_size=40), tokens=st.sampled_from([128, 256, 2048]), few=st.integers(1, 6))  # fmt: skip
@settings(max_examples=8, deadline=None)
@torch.inference_mode()
def test_no_interleaving_shows_that_there_were_guesses(
    shape: str, native: bool, moves: list[tuple[str, int]], tokens: int, few: int
) -> None:
    batch = batch_of(shape, few, reproducible=True, native=native, tokens=tokens)
    rows: list[tuple[int, Row]] = []
    waiting: list[Row] = []

    def advance() -> None:
        while waiting and batch.fits([waiting[:1]]):
            batch.join([[waiting.pop(0)]])
        batch.step()
        waiting[:0] = batch.preempted
        batch.preempted.clear()

    for move, number in moves:
        if move == "add" and len(rows) < 12:
            rows.append((number, row_of(number)))
            waiting.append(rows[-1][1])
        elif move == "abort" and batch.rows:
            batch.cancel(batch.rows[number % len(batch.rows)])
        else:
            advance()
    while waiting or batch.rows:
        advance()
    for kind, row in rows:
        whole = alone(shape, kind, native)
        count = len(row.said)
        assert row.finish == "cancelled" or count == len(whole.said)
        assert row.said == whole.said[:count] and row.logprobs == whole.logprobs[:count]
    assert batch.blocks.free == batch.blocks.count


@pytest.mark.parametrize("native", [False, True])
@torch.inference_mode()
def test_a_row_that_goes_on_elsewhere_says_the_rest_with_guesses(native: bool) -> None:
    whole = alone("packed", 0, native)
    row = row_of(0)
    row.said = whole.said[:11]
    batch = batch_of("packed", 4, reproducible=True, native=native)
    batch.join([[row]])
    while batch.rows:
        batch.step()
    assert row.said == whole.said and row.logprobs == whole.logprobs[11:]


@torch.inference_mode()
def test_guesses_in_int8_change_no_bit_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(decoder, "LEAST_WEIGHTS", 0)
    whole = alone("grouped queries", PLAIN + 2, True)
    row, batch = row_of(PLAIN + 2), batch_of("grouped queries", 4, reproducible=True, native=True)
    batch.join([[row]])
    while batch.rows:
        batch.step()
    assert row.said == whole.said and row.logprobs == whole.logprobs
    assert batch.kept > 0.2 * batch.guessed


@given(seed=st.integers(0, 1000), warmth=st.sampled_from([0.0, 0.3, 1.0, 1.7]))
@settings(max_examples=40, deadline=None)
def test_what_is_supposed_is_what_would_be_drawn(seed: int, warmth: float) -> None:
    """Rounding may tip a number that falls on the border of two tokens, so one in a hundred may differ."""
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(seed))
    rows = [
        Row([1], Sampling(seed=seed, temperature=0.0 if at % 8 == 7 else warmth), index=at)
        for at in range(64)
    ]
    knobs = Knobs.of([row.sampling for row in rows], HOST)
    drawn = draw(rows, logits, knobs)[0].tolist()
    same = sum(a == b for a, b in zip(suppose(rows, logits, knobs), drawn, strict=True))
    assert same >= 63


@torch.inference_mode()
def test_without_a_prediction_layer_nothing_is_guessed() -> None:
    model = Transformer(ModelConfig(preset="tick", vocab_size=64)).eval()
    initialise(model, seed=3)
    batch = Batch(model, slots=1, length=LENGTH, eos_id=EOS, pad_id=PAD, speculate=4)
    batch.join([[Row([1, 5], SETTINGS[0])]])
    while batch.rows:
        batch.step()
    assert batch.guessed == 0
