"""The broker and engines that never answer: what was asked is told apart from what a chip did."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.infer.sequence import Sampling
from bascule.serve.broker import Broker
from bascule.serve.inflight import Candidate, Refused


def broker_of(model: Path, *accelerators: str) -> tuple[Broker, list[str]]:
    notes: list[str] = []
    broker = Broker(
        model,
        [Candidate(f"pool{at}", name) for at, name in enumerate(accelerators)],
        note=lambda what, candidate, text: notes.append(what),
    )
    return broker, notes


def test_an_unknown_accelerator_is_the_askers_error_and_no_standby_is_tried(tmp_path: Path) -> None:
    broker, notes = broker_of(tmp_path, "cpuu", "cpu")
    with pytest.raises(UsageError, match="cpuu"):
        asyncio.run(broker.start())
    assert (notes, broker.candidate.accelerator, broker.state) == ([], "cpuu", "down")


def test_a_damaged_model_folder_condemns_no_pool(tmp_path: Path) -> None:
    Tokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    broker, notes = broker_of(tmp_path, "cpu", "sim:clean")
    with pytest.raises(UsageError):
        asyncio.run(broker.start())
    assert (notes, broker.candidate.accelerator) == ([], "cpu")


def test_half_a_line_of_a_dying_engine_is_its_end_and_open_answers_are_told(tmp_path: Path) -> None:
    async def dies_mid_line() -> Refused:
        broker, _ = broker_of(tmp_path, "cpuu")
        broker.state = "serving"
        broker._process = await asyncio.create_subprocess_exec("true", start_new_session=True)
        ticket = broker.submit([1], Sampling())
        reader = asyncio.StreamReader()
        reader.feed_data(b'{"load": {"runn')
        reader.feed_eof()
        await broker._listen(reader)
        broker._kill()  # has ended long ago
        told = ticket.arrivals.get_nowait()
        assert isinstance(told, Refused) and broker.state == "down"
        return told

    assert asyncio.run(dies_mid_line()).status == 503
