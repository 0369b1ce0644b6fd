"""The engine says what the model says, and no sequence notices its neighbours."""

from __future__ import annotations

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.errors import NonFiniteLogits, UsageError
from bascule.infer.batch import Batch
from bascule.infer.engine import Engine
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise

EOS, PAD = 2, 0
PROMPTS = [[1, 5, 9, 30], [1, 7], [1, 40, 41, 42, 43, 44, 45], [1, 9, 9]]


def tick(attention: str = "mla", ffn: str = "moe", spread: float = 2.0) -> Transformer:
    """A random model whose logits vary by `spread`: far from flat, so that mistakes show, and far from certain."""
    config = ModelConfig(
        preset="tick", attention=attention, ffn=ffn, vocab_size=64, tie_word_embeddings=False
    )
    model = Transformer(config).eval()
    initialise(model, seed=3)
    with torch.no_grad():
        logits = model(torch.tensor([[1, *range(5, 30)]])).logits_BTV
        model.lm_head.weight.mul_(spread / logits.std())
    return model


def engine(model: Transformer | None = None) -> Engine:
    return Engine(model or tick(), CpuAccelerator(), eos_id=EOS, pad_id=PAD)


@pytest.mark.parametrize(("attention", "ffn"), [("mla", "moe"), ("gqa", "swiglu")])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_the_trainers_full_forward(
    attention: str, ffn: str, temperature: float
) -> None:
    model = tick(attention, ffn)
    found = engine(model).generate(
        PROMPTS, Sampling(temperature=temperature, max_tokens=20), group_size=3
    )
    worst = 0.0
    for at, completion in enumerate(found):
        prompt = PROMPTS[at // 3]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.tokens])).logits_BTV[0] / temperature
        logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    assert worst < 1e-4


def test_greedy_batch_equals_greedy_one_by_one() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=24)
    together = engine().generate(PROMPTS, sampling)
    alone = [engine().generate([prompt], sampling)[0] for prompt in PROMPTS]
    assert [item.tokens for item in together] == [item.tokens for item in alone]


def test_a_sample_does_not_depend_on_its_batch_or_order() -> None:
    sampling = Sampling(max_tokens=24, seed=7, step=3)
    together = engine().generate(PROMPTS, sampling, group_size=4)
    backwards = engine().generate(
        PROMPTS[::-1],
        sampling,
        [*range(12, 16), *range(8, 12), *range(4, 8), *range(4)],
        group_size=4,
    )
    one = engine().generate([PROMPTS[2]], sampling, [9])
    assert one[0].tokens == together[9].tokens
    again = [backwards[12 - 4 * (at // 4) + at % 4].tokens for at in range(16)]
    assert again == [item.tokens for item in together]


def test_samples_of_a_group_differ_and_seeds_differ() -> None:
    first = engine().generate([PROMPTS[0]], Sampling(max_tokens=20, seed=1), group_size=8)
    other = engine().generate([PROMPTS[0]], Sampling(max_tokens=20, seed=2), group_size=8)
    assert len({tuple(item.tokens) for item in first}) == 8
    assert [item.tokens for item in first] != [item.tokens for item in other]


def test_small_batches_give_what_one_large_batch_gives() -> None:
    whole = engine().generate(PROMPTS, Sampling(max_tokens=12), group_size=3)
    small = engine()
    small.batch_size = 5
    assert [
        item.tokens for item in small.generate(PROMPTS, Sampling(max_tokens=12), group_size=3)
    ] == [item.tokens for item in whole]


def test_the_end_token_ends_a_completion() -> None:
    found = engine(tick(spread=0.1)).generate(
        PROMPTS, Sampling(max_tokens=100, temperature=1.0), group_size=8
    )
    assert {item.finish for item in found} == {"stop", "length"}
    for item in found:
        assert (item.tokens[-1] == EOS) == (item.finish == "stop")
        assert EOS not in item.tokens[:-1]
        assert len(item.tokens) == len(item.logprobs) <= 100


def test_stream_says_what_generate_says() -> None:
    sampling = Sampling(max_tokens=20, seed=5)
    whole = engine().generate([PROMPTS[0]], sampling, [3])[0]
    assert [token for token, _ in engine().stream(PROMPTS[0], sampling, index=3)] == whole.tokens


def test_a_prompt_that_does_not_fit_is_refused_not_cut() -> None:
    with pytest.raises(UsageError, match=r"128"):
        engine().generate([[1] * 100], Sampling(max_tokens=29))


def test_non_finite_logits_are_an_error() -> None:
    model = tick()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(NonFiniteLogits, match="NaN or infinity"):
        engine(model).generate(PROMPTS, Sampling(max_tokens=4))


@torch.inference_mode()
def test_rows_that_join_late_say_what_they_say_alone() -> None:
    model = tick()
    batch = Batch(model, slots=8, length=64, eos_id=EOS, pad_id=PAD)
    rows = [
        Row(prompt, Sampling(max_tokens=10 + 5 * at), index=at) for at, prompt in enumerate(PROMPTS)
    ]
    for row in rows:
        batch.join([[row]])
        batch.step()
        batch.step()
    while batch.rows:
        batch.step()
    for at, row in enumerate(rows):
        assert row.said == engine(model).generate([PROMPTS[at]], row.sampling, [at])[0].tokens


@torch.inference_mode()
def test_chunked_prefill_and_shared_blocks_change_nothing() -> None:
    model = tick()
    prompt = [1, *range(5, 60)]
    expected = engine(model).generate([prompt], Sampling(max_tokens=20))[0]
    batch = Batch(model, slots=2, length=100, eos_id=EOS, pad_id=PAD, share=True)
    reads = []
    for _ in range(2):
        row = Row(prompt, Sampling(max_tokens=20))
        prefill = batch.prefill(row)
        reads.append(len(prompt) - prefill.read)
        while not prefill.done:
            prefill.advance(7)
        batch.enter([row], prefill)
        while batch.rows:
            batch.step()
        assert row.said == expected.tokens
        assert max(abs(a - b) for a, b in zip(row.logprobs, expected.logprobs, strict=True)) < 1e-4
    assert reads == [56, 8]


@torch.inference_mode()
def test_a_row_taken_over_goes_on_with_its_own_random_numbers() -> None:
    model = tick()
    sampling = Sampling(max_tokens=20, seed=4)
    whole = engine(model).generate([PROMPTS[0]], sampling, [6])[0]
    rest = Row(PROMPTS[0], sampling, index=6, said=whole.tokens[:8])
    batch = Batch(model, slots=1, length=64, eos_id=EOS, pad_id=PAD)
    batch.join([[rest]])
    while batch.rows:
        batch.step()
    assert rest.said == whole.tokens
