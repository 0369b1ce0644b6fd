"""The broker and engines that never answer: what was asked is told apart from what a chip did."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.infer.sequence import Sampling
from bascule.serve.broker import Broker
from bascule.serve.inflight import Candidate, Refused, Ticket
from bascule.serve.process import EngineProcess
from tests.serve.conftest import make_run


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
        ended = await asyncio.create_subprocess_exec("true", start_new_session=True)
        here, there = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=here)
        there.sendall(b'{"load": {"runn')
        there.close()
        ticket = broker.submit([1], Sampling())
        engine = EngineProcess(ended, reader, writer)
        await broker._listen(engine)
        engine.kill()  # has ended long ago
        await engine.end()
        told = ticket.arrivals.get_nowait()
        assert isinstance(told, Refused) and broker.state == "down"
        return told

    assert asyncio.run(dies_mid_line()).status == 503


@pytest.mark.slow
def test_a_request_that_crashes_the_engine_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path / "run", {"main": "cpu"})
    broker, notes = broker_of(folder.model, "cpu", "sim:clean")

    async def whole(ticket: Ticket) -> list[int] | Refused:
        while ticket.open:
            arrival = await ticket.arrivals.get()
            if isinstance(arrival, Refused):
                return arrival
        return ticket.said[0]

    async def ask() -> list[list[int] | Refused]:
        await broker.start()
        long = Sampling(max_tokens=60, logit_bias=((Tokenizer().eos_id, -100.0),))
        alone = await whole(broker.submit([5, 6], long))
        tickets = [broker.submit([5, 6], long) for _ in range(3)]
        tickets.insert(1, broker.submit([5], Sampling(), form={"grammar": 5, "no": "such form"}))
        found = await asyncio.gather(*map(whole, tickets))
        await broker.close()
        return [alone, *found]

    alone, first, poison, *others = asyncio.run(ask())
    assert isinstance(poison, Refused) and poison.status == 500
    assert all(one == alone for one in (first, *others)) and len(alone) == 60  # type: ignore[arg-type]
    assert notes == ["engine crashed", "engine crashed"] and broker.candidate.pool == "pool0"
