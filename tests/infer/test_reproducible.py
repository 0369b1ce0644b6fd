"""Reproducible mode: the bits of an answer depend on its request alone, whatever else comes, goes, or is sent back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.infer.batch import Batch
from bascule.infer.engine import Engine
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise

EOS, PAD, LENGTH = 2, 0, 128
SHAPES = {
    "packed": {"preset": "tick"},
    "grouped queries": {"preset": "tick", "attention": "gqa", "ffn": "swiglu"},
    "laid out matrices": {
        "preset": "tick",
        "attention": "gqa",
        "ffn": "swiglu",
        "hidden_size": 512,
    },
    "many experts": {"preset": "tick", "n_routed_experts": 32},
}
MODELS: dict[str, Transformer] = {}
SETTINGS = [
    Sampling(max_tokens=30, seed=1),
    Sampling(max_tokens=70, seed=2, temperature=0.7, top_p=0.9),
    Sampling(max_tokens=20, temperature=0.0),
    Sampling(max_tokens=40, seed=3, top_k=5, presence_penalty=0.5, logit_bias=((7, 1.0),)),
    Sampling(max_tokens=50, seed=4, min_p=0.05, frequency_penalty=0.3),
]


def model_of(shape: str) -> Transformer:
    if shape not in MODELS:
        MODELS[shape] = Transformer(ModelConfig(**SHAPES[shape], vocab_size=64)).eval()  # type: ignore[arg-type]
        initialise(MODELS[shape], seed=3)
    return MODELS[shape]


def row_of(kind: int) -> Row:
    prompt = [1, *(5 + (kind * 7 + at) % 50 for at in range(3 + 11 * (kind % 5)))]
    return Row(prompt, SETTINGS[kind % len(SETTINGS)], index=kind)


ALONE: dict[tuple[str, int, bool], Row] = {}


def alone(shape: str, kind: int, native: bool) -> Row:
    if (shape, kind, native) not in ALONE:
        row = ALONE[shape, kind, native] = row_of(kind)
        batch = Batch(model_of(shape), slots=1, length=LENGTH, eos_id=EOS, pad_id=PAD, reproducible=True, native=native)  # fmt: skip
        batch.join([[row]])
        while batch.rows:
            batch.step()
    return ALONE[shape, kind, native]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@given(moves=st.lists(st.tuples(st.sampled_from(["add", "add", "step", "step", "step", "abort"]), st.integers(0, 9)), max_size=40), tokens=st.sampled_from([128, 256, 2048]))  # fmt: skip
@settings(max_examples=4, deadline=None)
@torch.inference_mode()
def test_any_interleaving_gives_each_request_the_bits_it_has_alone(
    shape: str, native: bool, moves: list[tuple[str, int]], tokens: int
) -> None:
    batch = Batch(
        model_of(shape), slots=12, length=LENGTH, eos_id=EOS, pad_id=PAD, tokens=tokens, reproducible=True, native=native
    )  # fmt: skip
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
        assert row.said == whole.said[:count]
        assert row.logprobs == whole.logprobs[:count]
    assert batch.blocks.free == batch.blocks.count


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_engine_gives_one_completion_the_same_bits_in_every_batch(
    shape: str, native: bool
) -> None:
    engine = Engine(model_of(shape), CpuAccelerator(), eos_id=EOS, pad_id=PAD, reproducible=True, native=native)  # fmt: skip
    prompts = [[1, *range(5, 8 + 5 * at)] for at in range(10)]
    sampling = Sampling(max_tokens=24, seed=9)
    together = engine.generate(prompts, sampling)
    for at in (0, 4, 9):
        assert engine.generate([prompts[at]], sampling, [at]) == [together[at]]
