"""The compiled decoding step says what the model says, for every kind of model, in fp32 and int8, and a spoiled weight is seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.accelerators.cpu import CpuAccelerator
from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig, RopeScaling
from bascule.errors import NonFiniteLogits
from bascule.infer import compiled as room
from bascule.infer import linear
from bascule.infer.batch import Batch
from bascule.infer.compiled import compiled
from bascule.infer.decoder import Decoder
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.model.pages import BLOCK, PagedCache, Pages
from bascule.model.transformer import Transformer
from bascule.native import build
from bascule.serve.worker import _real_cpu
from tests.infer.test_packed import random_model

SHAPES: dict[str, dict[str, object]] = {
    "nano": {"preset": "nano"},
    "choices of several groups": {"preset": "tick", "n_routed_experts": 32, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5},
    "weights as they come": {"preset": "tick", "norm_topk_prob": False, "num_experts_per_tok": 2, "n_shared_experts": 2},
    "low-rank queries and biases": {"preset": "tick", "q_lora_rank": 8, "attention_bias": True, "ffn": "swiglu"},
    "odd sizes": {"preset": "tick", "kv_lora_rank": 21, "qk_rope_head_dim": 6, "qk_nope_head_dim": 5, "v_head_dim": 11, "moe_intermediate_size": 13, "hidden_size": 44},
    "stretched rotation": {"preset": "tick", "rope_scaling": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)},
    "grouped queries": {"preset": "tick", "attention": "gqa", "ffn": "swiglu", "num_attention_heads": 6, "num_key_value_heads": 2},
    "one key head for many": {"preset": "tick", "attention": "gqa", "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 10},
    "normed heads and biases": {"preset": "tick", "attention": "gqa", "ffn": "swiglu", "qk_norm": True, "attention_bias": True, "attention_output_bias": False},
    "untied": {"preset": "nano", "tie_word_embeddings": False},
}  # fmt: skip

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C++ compiler here")


def filled(model: Transformer, lengths: list[int], room_blocks: int) -> tuple[Pages, np.ndarray]:
    """Rows of random tokens in pages whose blocks lie in no order; their tables have `room_blocks` columns."""
    pages = Pages(model.config, room_blocks * len(lengths), torch.device("cpu"), torch.float32)
    order = np.random.default_rng(5).permutation(room_blocks * len(lengths)) + 1
    tables = order.reshape(len(lengths), room_blocks).astype(np.int64)
    pages.clean(order.tolist())
    for row, length in enumerate(lengths):
        tokens = (torch.arange(length)[None] * 7 + row * 3) % 64
        model(tokens, cache=PagedCache(pages, tables[row : row + 1], np.zeros(1, dtype=np.int64)))
    return pages, tables


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[9], [1, 16, 33, 15, 47, 2, 31, 32]])
@torch.inference_mode()
def test_a_step_says_and_writes_what_the_model_does(shape: str, lengths: list[int]) -> None:
    model = random_model(**SHAPES[shape])
    pages, tables = filled(model, lengths, 4)
    copy = Pages(model.config, 4 * len(lengths), torch.device("cpu"), torch.float32)
    for mine, theirs in zip(copy.pools, pages.pools, strict=True):
        mine.copy_(theirs)
    decoder, read = Decoder(model, copy), np.array(lengths)
    for step in range(3):
        said = [(row * 5 + step) % 64 for row in range(len(lengths))]
        output = model(torch.tensor(said)[:, None], cache=PagedCache(pages, tables, read))
        logits_BV, hidden_BD = decoder.step(said, tables, read)
        spread = output.logits_BTV.std()
        assert (logits_BV - output.logits_BTV[:, 0]).abs().max() < 1e-5 * spread
        torch.testing.assert_close(hidden_BD, output.hidden_BTD[:, 0], rtol=1e-4, atol=1e-5)
        read = read + 1
    for mine, theirs in zip(copy.pools, pages.pools, strict=True):
        torch.testing.assert_close(mine[:, :, 1:], theirs[:, :, 1:], rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("shape", ["nano", "grouped queries", "choices of several groups"])
@given(order=st.permutations(range(9)), count=st.integers(1, 9))
@settings(max_examples=10, deadline=None)
@torch.inference_mode()
def test_a_rows_bits_do_not_depend_on_the_others(shape: str, order: list[int], count: int) -> None:
    model = random_model(**SHAPES[shape])
    lengths = [1, 5, 16, 17, 30, 8, 33, 40, 12]
    pages, tables = filled(model, lengths, 4)
    decoder, read = Decoder(model, pages), np.array(lengths)
    alone = [decoder.step([row], tables[[row]], read[[row]])[0] for row in range(9)]
    chosen = order[:count]
    together, _ = decoder.step(chosen, tables[chosen], read[chosen])
    assert all(torch.equal(together[[at]], alone[row]) for at, row in enumerate(chosen))


@needs_compiler
@pytest.mark.parametrize("shape", ["nano", "grouped queries"])
@pytest.mark.parametrize("rows", [1, 2, 40])
@torch.inference_mode()
def test_threads_change_no_bit(shape: str, rows: int) -> None:
    model = random_model(**SHAPES[shape], vocab_size=5000)  # a head worth threads for one row
    lengths = [3 + 3 * row for row in range(rows)]
    pages, tables = filled(model, lengths, 1 + max(lengths) // BLOCK)
    decoder, threads = Decoder(model, pages), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(decoder.step(list(range(rows)), tables, np.array(lengths))[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_compiler
@torch.inference_mode()
def test_int8_steps_say_what_the_laid_out_model_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 0)
    model = random_model(preset="tick", attention="gqa", ffn="swiglu")
    laid = linear.lay_out(model, "int8", native=True)
    assert any(isinstance(part, linear.PanelLinear) for part in laid.modules())
    lengths = [4, 21, 16]
    pages, tables = filled(laid, lengths, 3)
    logits_BV, _ = Decoder(laid, pages).step([3, 4, 5], tables, np.array(lengths))
    read = laid(torch.tensor([[3], [4], [5]]), cache=PagedCache(pages, tables, np.array(lengths))).logits_BTV[:, 0]  # fmt: skip
    assert (logits_BV - read).abs().max() < 1e-5 * read.std()
    exact = model(torch.tensor([[3], [4], [5]]), cache=PagedCache(pages, tables, np.array(lengths))).logits_BTV[:, 0]  # fmt: skip
    assert (logits_BV - exact).abs().max() > 1e-4 * read.std()


@needs_compiler
@pytest.mark.parametrize(
    "name", ["self_attn.o_proj.weight", "mlp.gate.weight", "mlp.experts.down_proj", "self_attn.kv_b_proj.weight"]
)  # fmt: skip
@torch.inference_mode()
def test_nan_in_a_weight_ends_the_step(name: str) -> None:
    model = random_model(preset="nano")
    weight = dict(model.model.layers[-1].named_parameters())[name]
    weight.flatten()[-1 if weight.ndim > 2 else 0] = float("nan")
    if weight.ndim > 2:
        weight.fill_(float("nan"))
    batch = Batch(model, slots=4, length=64, eos_id=-1, pad_id=0, native=True)
    assert batch.native
    with pytest.raises(NonFiniteLogits):
        batch.join([[Row([1, 2, 3 + at], Sampling(max_tokens=9))] for at in range(4)])
        batch.step()


def test_only_the_real_cpu_takes_it() -> None:
    assert _real_cpu(CpuAccelerator())
    assert not _real_cpu(open_accelerator("sim:clean@cpu"))


@torch.inference_mode()
def test_without_a_compiler_steps_go_through_torch_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room._outcome.cache_clear()
    build.cache_clear()
    monkeypatch.setenv("PATH", "")
    try:
        batch = Batch(Transformer(ModelConfig(preset="nano")), slots=1, length=64, eos_id=-1, pad_id=0, native=True)  # fmt: skip
        assert not batch.native and "g++" in room.why_not()
    finally:
        room._outcome.cache_clear()
        build.cache_clear()


@needs_compiler
@torch.inference_mode()
def test_a_batch_says_the_same_with_and_without_it() -> None:
    model = random_model(preset="nano")
    asked = [
        Sampling(max_tokens=24, seed=kind, temperature=temperature)
        for kind, temperature in itertools.product(range(3), (0.0, 0.9))
    ]
    said = []
    for native in (False, True):
        rows = [Row([1, *range(3, 6 + 9 * at)], one) for at, one in enumerate(asked)]
        batch = Batch(model, slots=8, length=128, eos_id=2, pad_id=0, native=native)
        batch.join([[row] for row in rows])
        while batch.rows:
            batch.step()
        said.append(rows)
    for plain, quick in zip(*said, strict=True):
        assert plain.said == quick.said
        assert quick.logprobs == pytest.approx(plain.logprobs, abs=2e-5)


@needs_compiler
@torch.inference_mode()
def test_many_logits_lie_in_memory_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(**SHAPES["nano"])
    lengths = [9, 3, 5]
    pages, tables = filled(model, lengths, 4)
    decoder, read = Decoder(model, pages), np.array(lengths)
    fresh = decoder.step([3, 4, 5], tables, read)[0].clone()
    monkeypatch.setattr("bascule.infer.decoder.KEPT_LOGITS", 1)
    first = decoder.step([3, 4, 5], tables, read)[0]
    assert torch.equal(first, fresh)
    fewer = decoder.step([3, 4], tables[:2], read[:2])[0]
    assert torch.equal(fewer, fresh[:2]) and fewer.data_ptr() == first.data_ptr()
