"""Cached calls give the logits of the full forward: prefill and decode, both attentions, ragged rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bascule.config.model import ModelConfig
from bascule.model import weights
from bascule.model.transformer import Transformer

SHAPES = {
    "mla": ModelConfig(preset="tick"),
    "mla_q_lora": ModelConfig(preset="tick", q_lora_rank=16, v_head_dim=24),
    "gqa": ModelConfig(preset="tick", attention="gqa", num_key_value_heads=2, qk_norm=True),
    "gqa_dense": ModelConfig(preset="tick", attention="gqa", ffn="swiglu", num_key_value_heads=4),
}
LENGTHS = torch.tensor([9, 4, 12, 1, 12])
LONGEST, TOTAL = 12, 22


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Transformer:
    made = Transformer(SHAPES[request.param])
    weights.initialise(made, seed=5)
    return made.requires_grad_(False)


@pytest.fixture
def tokens(model: Transformer) -> Tensor:
    return torch.randint(
        0,
        model.config.vocab_size,
        (len(LENGTHS), TOTAL),
        generator=torch.Generator().manual_seed(2),
    )


def _close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < 1e-5 * expected.pow(2).mean().sqrt()


def _prompts(tokens: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.arange(LONGEST) < LENGTHS[:, None]
    return tokens[:, :LONGEST].masked_fill(~mask, 0), mask


def test_prefill_of_ragged_prompts_equals_the_full_forward(
    model: Transformer, tokens: Tensor
) -> None:
    prompts, mask = _prompts(tokens)
    cache = model.new_cache(len(LENGTHS), TOTAL)
    found = model(prompts, mask=mask, cache=cache).logits_BTV
    _close(found[mask], model(tokens).logits_BTV[:, :LONGEST][mask])
    assert cache.lengths_B.tolist() == LENGTHS.tolist()


def test_decoding_ragged_rows_equals_the_full_forward(model: Transformer, tokens: Tensor) -> None:
    expected, rows = model(tokens).logits_BTV, torch.arange(len(LENGTHS))
    prompts, mask = _prompts(tokens)
    cache = model.new_cache(len(LENGTHS), TOTAL)
    model(prompts, mask=mask, cache=cache)
    for step in range(TOTAL - LONGEST):
        at = LENGTHS + step
        _close(model(tokens[rows, at][:, None], cache=cache).logits_BTV[:, 0], expected[rows, at])


def test_decoding_equal_rows_equals_the_full_forward(model: Transformer, tokens: Tensor) -> None:
    expected = model(tokens).logits_BTV
    cache = model.new_cache(len(LENGTHS), TOTAL)
    for at in range(TOTAL):
        _close(model(tokens[:, at : at + 1], cache=cache).logits_BTV[:, 0], expected[:, at])


def test_a_prompt_may_come_in_pieces(model: Transformer, tokens: Tensor) -> None:
    expected = model(tokens).logits_BTV
    cache = model.new_cache(len(LENGTHS), TOTAL)
    pieces = [model(piece, cache=cache).logits_BTV for piece in tokens.split([3, 8, 1, 10], 1)]
    _close(torch.cat(pieces, 1), expected)


def test_pieces_may_be_ragged(model: Transformer, tokens: Tensor) -> None:
    """Second piece: every row adds its own number of tokens, real ones first."""
    expected, rows = model(tokens).logits_BTV, torch.arange(len(LENGTHS))
    prompts, mask = _prompts(tokens)
    cache = model.new_cache(len(LENGTHS), TOTAL)
    model(prompts, mask=mask, cache=cache)
    added = torch.tensor([1, 5, 2, 3, 5])
    at = LENGTHS[:, None] + torch.arange(5)
    real = torch.arange(5) < added[:, None]
    found = model(tokens[rows[:, None], at], mask=real, cache=cache).logits_BTV
    _close(found[real], expected[rows[:, None], at][real])
    last = model(tokens[rows, LENGTHS + added][:, None], cache=cache).logits_BTV[:, 0]
    _close(last, expected[rows, LENGTHS + added])


def test_select_keeps_rows_and_repeat_copies_them(model: Transformer, tokens: Tensor) -> None:
    expected = model(tokens).logits_BTV
    prompts, mask = _prompts(tokens)
    cache = model.new_cache(len(LENGTHS), TOTAL)
    model(prompts, mask=mask, cache=cache)
    rows = torch.tensor([3, 3, 1, 1])
    cache = cache.select(torch.tensor([3, 1])).repeat(2)
    assert cache.longest == 4 and cache.batch == 4
    for step in range(6):
        at = LENGTHS[rows] + step
        _close(model(tokens[rows, at][:, None], cache=cache).logits_BTV[:, 0], expected[rows, at])


def test_logits_can_be_asked_for_one_token_a_row(model: Transformer, tokens: Tensor) -> None:
    prompts, mask = _prompts(tokens)
    everywhere = model(prompts, mask=mask).logits_BTV
    found = model(
        prompts, mask=mask, cache=model.new_cache(len(LENGTHS), TOTAL), at_B=LENGTHS - 1
    ).logits_BTV
    _close(found[:, 0], everywhere[torch.arange(len(LENGTHS)), LENGTHS - 1])


def test_padding_on_the_left_is_invisible(model: Transformer, tokens: Tensor) -> None:
    pad = 4
    padded = torch.cat([torch.zeros(len(LENGTHS), pad, dtype=torch.int64), tokens], 1)
    mask = torch.arange(pad + TOTAL).expand(len(LENGTHS), -1) >= pad
    positions = (torch.arange(pad + TOTAL) - pad).clamp(min=0).expand(len(LENGTHS), -1)
    found = model(padded, mask=mask, positions_BT=positions).logits_BTV
    assert found.isfinite().all()
    _close(found[:, pad:], model(tokens).logits_BTV)


def test_tokens_do_not_see_the_future(model: Transformer, tokens: Tensor) -> None:
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % model.config.vocab_size
    _close(model(changed).logits_BTV[:, :10], model(tokens).logits_BTV[:, :10])


def test_a_full_cache_refuses_more(model: Transformer, tokens: Tensor) -> None:
    cache = model.new_cache(len(LENGTHS), 6)
    with pytest.raises(ValueError, match="holds 6 a row"):
        model(tokens[:, :7], cache=cache)


def test_positions_beyond_the_table_are_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="max_position_embeddings=128"):
        model(torch.zeros(1, 129, dtype=torch.int64))
