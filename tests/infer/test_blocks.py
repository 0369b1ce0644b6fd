"""Blocks belong to whoever holds them, and are found again by what they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.infer.batch import Batch
from bascule.infer.blocks import Blocks, OutOfBlocks
from bascule.infer.engine import Engine
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.model.pages import BLOCK
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise

EOS, PAD = 2, 0


def small(attention: str = "mla", ffn: str = "moe") -> Transformer:
    model = Transformer(ModelConfig(preset="tick", attention=attention, ffn=ffn, vocab_size=64))
    initialise(model, seed=3)
    return model.eval()


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 99))))
@settings(max_examples=100, deadline=None)
def test_free_and_held_blocks_always_add_up(moves: list[tuple[str, int]]) -> None:
    blocks, held = Blocks(12), []
    for move, number in moves:
        if move == "take":
            try:
                taken = blocks.take(number % 4)
            except OutOfBlocks:
                assert number % 4 > blocks.free
                continue
            assert not {one for table in held for one in table} & set(taken)
            held.append(taken)
            blocks.keep([number] * (BLOCK * len(taken)), taken)
        elif held and move == "share":
            held.append(held[number % len(held)])
            blocks.share(held[-1])
        elif held:
            blocks.release(held.pop(number % len(held)))
        assert blocks.free + len({one for table in held for one in table}) == blocks.count


def test_a_prefix_is_found_until_its_space_is_wanted_and_its_end_goes_first() -> None:
    blocks = Blocks(4)
    text = list(range(4 * BLOCK))
    table = blocks.take(4)
    blocks.keep(text, table)
    blocks.release(table)
    assert blocks.free == 4
    assert blocks.find([*text, 9]) == table
    blocks.release(table)
    other = blocks.take(1)
    assert other == table[3:]
    assert blocks.find([*text, 9]) == table[:3]
    assert blocks.find([7, *text]) == []


def test_the_last_token_of_a_prompt_is_never_taken_from_a_shared_block() -> None:
    blocks = Blocks(2)
    table = blocks.take(2)
    blocks.keep(list(range(2 * BLOCK)), table)
    assert blocks.find(list(range(2 * BLOCK))) == table[:1]


@torch.inference_mode()
def test_samples_of_a_group_share_the_blocks_of_their_prompt() -> None:
    batch = Batch(small(), slots=4, length=64, eos_id=EOS, pad_id=PAD)
    rows = [Row([1, *range(5, 44)], Sampling(max_tokens=4), index=at) for at in range(4)]
    batch.join([rows])
    assert len({tuple(row.blocks[:2]) for row in rows}) == 1
    assert len({row.blocks[2] for row in rows}) == 4
    assert batch.used_tokens == (2 + 4) * BLOCK


@pytest.mark.parametrize(("attention", "ffn"), [("mla", "moe"), ("gqa", "swiglu")])
@torch.inference_mode()
def test_preempted_rows_come_back_and_say_what_they_say_with_room(attention: str, ffn: str) -> None:
    model = small(attention, ffn)
    prompts = [[1, *range(5, 20 + 3 * at)] for at in range(4)]
    sampling = Sampling(max_tokens=60, seed=1)
    expected = Engine(model, CpuAccelerator(), eos_id=-1, pad_id=PAD).generate(prompts, sampling)
    batch = Batch(model, slots=4, length=128, eos_id=-1, pad_id=PAD, tokens=160)
    rows = [Row(prompt, sampling, index=at) for at, prompt in enumerate(prompts)]
    waiting = [[row] for row in rows]
    while waiting or batch.rows:
        while waiting and batch.fits(waiting[:1]):
            batch.join([waiting.pop(0)])
        batch.step()
        waiting = [*([row] for row in batch.preempted), *waiting]
        batch.preempted.clear()
    assert batch.preemptions > 0
    assert [row.said for row in rows] == [item.tokens for item in expected]
    assert batch.blocks.free == batch.blocks.count
