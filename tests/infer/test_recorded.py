"""A recorded step says what the plain one says, whatever rows come and go; on a CPU, with what tests/recordings.py makes of a recording.
On a foreign device: tests/standin/on_npu.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bascule.accelerators.base import Recorder, Role
from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.infer.batch import Batch
from bascule.infer.engine import Engine
from bascule.infer.recorded import RECORD_AFTER
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.model import weights
from bascule.model.pages import Pages, StandingCache
from bascule.model.transformer import Transformer
from tests.recordings import Recordings

DENSE = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, attention="gqa", num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    ffn="swiglu", intermediate_size=64, max_position_embeddings=256,
)  # fmt: skip
"""No `packed` form: what the CPU would otherwise decode small models with."""


def model() -> Transformer:
    made = Transformer(DENSE)
    weights.initialise(made, 0)
    return made.eval()


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 60, (2 + 5 * at,), generator=generator).tolist() for at in range(count)]  # fmt: skip


@torch.inference_mode()
def said(record: Any, *, reproducible: bool = False, each: Callable[[Batch], None] = lambda _: None) -> list[Row]:  # fmt: skip
    """Seven rows of different lengths and patience, which join one after the other and leave when they are done."""
    batch = Batch(
        model(), slots=7, length=256, eos_id=-1, pad_id=0, reproducible=reproducible, record=record
    )
    rows = [Row(text, Sampling(max_tokens=20 + 15 * at), index=at) for at, text in enumerate(texts(7))]  # fmt: skip
    for at, row in enumerate(rows):
        batch.join([[row]])
        for _ in range(3 if at < 6 else 200):
            batch.step()
            each(batch)
    assert not batch.rows
    return rows


@pytest.mark.parametrize("reproducible", [False, True])
def test_recorded_steps_say_what_plain_ones_say(reproducible: bool) -> None:
    record = Recordings("cpu")
    recorded = said(record, reproducible=reproducible)
    plain = said(None, reproducible=reproducible)
    assert record.played > 60
    for one, other in zip(recorded, plain, strict=True):
        assert one.said == other.said
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4)  # fmt: skip


def test_a_shape_is_recorded_once_it_was_met_often_enough() -> None:
    counts: list[int] = []
    record = Recordings("cpu")

    def count(batch: Batch) -> None:
        assert batch._runner.recorded is not None
        counts.append(batch._runner.recorded.recordings)

    said(record, each=count)
    assert not any(counts[:RECORD_AFTER])
    assert (
        1 <= counts[-1] <= 8
    )  # rows of 1, 2, 4 and 8, slots of 64, 128 and 256: not each was met long enough


def test_where_recording_fails_steps_go_on_and_the_reason_is_kept() -> None:
    troubles: list[str] = []
    asked: list[int] = []

    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        asked.append(1)
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    rows = said(refuse, each=lambda batch: troubles.append(batch.trouble))
    assert [row.said for row in rows] == [row.said for row in said(None)]
    assert not troubles[0] and "could not be recorded: operation not permitted" in troubles[-1]
    assert len(asked) <= 8  # each shape is tried once


def test_an_engine_says_once_why_it_does_not_record_streaming_or_not() -> None:
    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("no recordings here")

    class NoRecordings(CpuAccelerator):
        def recorder(self, role: Role) -> Recorder | None:
            return refuse

    for streaming in (True, False):
        told: list[str] = []
        engine = Engine(model(), NoRecordings(), eos_id=-1, pad_id=0, warn=told.append)
        for _ in range(2):
            if streaming:
                list(engine.stream([3, 4, 5], Sampling(max_tokens=20)))
            else:
                engine.generate([[3, 4, 5]], Sampling(max_tokens=20))
        assert len(told) == 1 and "no recordings here" in told[0]


def test_a_standing_cache_takes_one_token() -> None:
    pages = Pages(DENSE, 4, torch.device("cpu"), torch.float32)
    cache = StandingCache(pages, torch.ones(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), width=64)  # fmt: skip
    with pytest.raises(ValueError, match="takes one token a row"):
        cache.open(2, ragged=False)
