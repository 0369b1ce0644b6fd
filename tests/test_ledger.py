"""The ledger survives crashes, several writers, and says what it cannot read."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.errors import CheckFailed, LedgerError
from bascule.ledger import Ledger, memory_peaks, read_ledger
from bascule.records import Judgement, MemoryPeak, StepStats, Warned


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", attempt=3, pool="ascend")
    ledger.append(
        StepStats(
            step=1,
            phase="sft",
            loss=0.1 + 0.2,
            grad_norm=1.0,
            learning_rate=1e-3,
            tokens=5,
            seconds=0.5,
        )
    )
    (record,) = ledger.read()
    assert isinstance(record, StepStats)
    assert (record.loss, record.attempt, record.pool) == (0.1 + 0.2, 3, "ascend")


@given(cut=st.integers(min_value=1, max_value=60))
def test_a_torn_last_line_is_left_out_cut_off_and_reported(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("torn") / "ledger.jsonl")
    ledger.append(
        Judgement(step=1, commit=True, reason="kept"), Judgement(step=2, commit=True, reason="torn")
    )
    data = ledger.path.read_bytes()
    ledger.path.write_bytes(data[:-cut])
    assert [record.step for record in ledger.read()] == [1]
    ledger.append(Judgement(step=3, commit=True, reason="after"))
    kinds = [(record.kind, getattr(record, "step", None)) for record in ledger.read()]
    assert kinds == [("judgement", 1), ("warning", None), ("judgement", 3)]


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"kind": "judge\n{}\n')
    with pytest.raises(LedgerError, match="line 1, is damaged"):
        read_ledger(path)


def test_a_ledger_from_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps({"schema_version": 999, "kind": "judgement"}) + "\n")
    with pytest.raises(LedgerError, match="newer bascule"):
        read_ledger(path)


def test_strict_turns_a_warning_into_an_error_after_writing_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", strict=True)
    with pytest.raises(CheckFailed, match="kernel fallback"):
        ledger.warn("kernel fallback", "flash attention is missing")
    assert isinstance(ledger.read()[0], Warned)


def _write_many(path: Path, writer: int) -> None:
    ledger = Ledger(path, attempt=writer)
    for step in range(200):
        ledger.append(Judgement(step=step, commit=True, reason="x" * 200))


def test_lines_of_several_processes_never_interleave(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, number)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records = read_ledger(path)
    assert sorted((record.attempt, record.step) for record in records) == [
        (w, s) for w in (1, 2) for s in range(200)
    ]


def test_a_full_disk_is_an_error_and_never_a_silent_loss() -> None:
    with pytest.raises(OSError, match="No space left"):
        Ledger(Path("/dev/full")).append(Judgement(step=1, commit=True, reason="x"))


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\xfa", b"\0" * 40, b'{"kind": "\xe4"}', b'{"schema_version": "2"}']
)
def test_bytes_that_are_no_record_are_refused_with_their_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(LedgerError, match="line 1, is damaged"):
        read_ledger(path)


def test_the_repair_of_a_torn_line_is_spoken_and_strict_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"kind": "ju')
    Ledger(path).append(Judgement(step=1, commit=True, reason="after"))
    assert "WARN torn ledger line: 12 bytes" in capsys.readouterr().err
    with open(path, "ab") as file:
        file.write(b'{"kind')
    with pytest.raises(CheckFailed, match="torn ledger line"):
        Ledger(path, strict=True).append(Judgement(step=2, commit=True, reason="after"))
    assert [record.kind for record in read_ledger(path)] == ["warning", "judgement"] * 2


def test_a_trainers_peak_of_memory_is_the_largest_of_its_launches(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", pool="a")
    for phase, peak in (("sft", 5), ("sft", 9), ("grpo", 7)):
        ledger.append(MemoryPeak(phase=phase, peak_bytes=peak))
    assert memory_peaks(ledger.read()) == {"a": {"sft": 9, "grpo": 7}}
