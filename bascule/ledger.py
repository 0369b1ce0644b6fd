"""The run's append-only record: one typed record a line, written so that a crash at any instant loses at most the line in flight.

Several processes append to one ledger: each line is one `write` to a file opened with O_APPEND, under a file lock, so lines
never interleave. A torn last line (the machine died mid-write) is tolerated on reading, cut off before the next append, and
reported as a warning record; a torn line anywhere else is damage and is refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from bascule.errors import CheckFailed, LedgerError
from bascule.records import ADAPTER, SCHEMA_VERSION, AnyRecord, MemoryPeak, Record, Warned

R = TypeVar("R", bound=Record)


class Ledger:
    """Append and read one `ledger.jsonl`. `attempt` and `pool` are stamped on records that do not carry their own."""

    def __init__(
        self, path: Path, *, attempt: int = 0, pool: str | None = None, strict: bool = False
    ) -> None:
        self.path = path
        self.attempt = attempt
        self.pool = pool
        self.strict = strict

    def append(self, *records: Record) -> None:
        """Write records durably enough to survive this process's death (flushed to the kernel, under a lock).

        A `Warned` record is also printed to stderr; with `strict` it raises CheckFailed after it has been written.
        """
        stamped: list[Record] = [self._stamp(record) for record in records]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            repaired = _cut_torn_tail(handle)
            if repaired:
                note = Warned(
                    what="torn ledger line",
                    detail=f"{repaired} bytes of an unfinished last line were cut off",
                )
                stamped.insert(0, self._stamp(note))
            text = "".join(record.model_dump_json() + "\n" for record in stamped)
            _write_all(handle, text.encode(), self.path)
        finally:
            os.close(handle)
        self._speak([record for record in stamped if isinstance(record, Warned)])

    def warn(self, what: str, detail: str, *, step: int | None = None) -> None:
        """Record a fallback, truncation, dropped sample or fresh start. Never silent (issue part 1)."""
        self.append(Warned(what=what, detail=detail, step=step))

    def read(self) -> list[AnyRecord]:
        """All records in order. A missing ledger is empty; a torn last line is left out (see `torn`)."""
        return read_ledger(self.path)

    def _stamp(self, record: R) -> R:
        changes: dict[str, object] = {}
        if record.attempt == 0 and self.attempt:
            changes["attempt"] = self.attempt
        if record.pool is None and self.pool is not None:
            changes["pool"] = self.pool
        return record.model_copy(update=changes) if changes else record

    def _speak(self, warnings: list[Warned]) -> None:
        for warning in warnings:
            print(f"WARN {warning.what}: {warning.detail}", file=sys.stderr, flush=True)
        if warnings and self.strict:
            raise CheckFailed(f"--strict: {warnings[0].what}: {warnings[0].detail}")


def read_ledger(path: Path) -> list[AnyRecord]:
    """Parse a ledger. Raises LedgerError for damage before the last line or records of a newer bascule."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = data.split(b"\n")
    lines.pop()  # after the final newline: empty, or a torn tail that never got its newline
    return [parse_line(line, path, number) for number, line in enumerate(lines, start=1) if line]


def of_kind(records: Iterable[AnyRecord], kind: type[R]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]


def last(records: Iterable[AnyRecord], kind: type[R]) -> R | None:
    found = of_kind(records, kind)
    return found[-1] if found else None


def parse_line(line: bytes, path: Path, number: int = 0) -> AnyRecord:
    """One line of a ledger as a record. `number` is the line's, for the error."""
    try:
        value = json.loads(line)
    except ValueError as error:  # not JSON, or bytes that are no text at all
        raise LedgerError(
            f"{path}, line {number}, is damaged ({error}). Move the run folder aside; lines before it are intact."
        ) from None
    version = value.get("schema_version", 0) if isinstance(value, dict) else 0
    if not isinstance(version, int):
        raise LedgerError(
            f"{path}, line {number}, is damaged (its schema_version is {version!r}, and a whole number is allowed). "
            "Move the run folder aside; lines before it are intact."
        )
    if version > SCHEMA_VERSION:
        raise LedgerError(
            f"{path}, line {number}, was written by a newer bascule (schema {version}; this one reads up to {SCHEMA_VERSION}). "
            "Update bascule, or use another run folder."
        )
    try:
        return ADAPTER.validate_python(value)
    except ValidationError as error:
        raise LedgerError(
            f"{path}, line {number}, is not a record of bascule: {error.errors()[0]['msg']}."
        ) from None


def _write_all(handle: int, data: bytes, path: Path) -> None:
    """One write. A short one means the disk is full: the torn line it leaves is cut off by the next append."""
    if os.write(handle, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _cut_torn_tail(handle: int) -> int:
    """Cut bytes after the last newline, if any. Returns how many were cut."""
    size = os.lseek(handle, 0, os.SEEK_END)
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return 0
    end = size
    while end > 0:
        start = max(0, end - 65536)
        block = os.pread(handle, end - start, start)
        cut = block.rfind(b"\n")
        if cut >= 0:
            end = start + cut + 1
            break
        end = start
    os.ftruncate(handle, end)
    return size - end


def memory_peaks(records: Sequence[AnyRecord]) -> dict[str, dict[str, int]]:
    """The most memory in bytes that each pool's trainer took in each phase, over all launches."""
    found: dict[str, dict[str, int]] = {}
    for one in of_kind(records, MemoryPeak):
        phases = found.setdefault(one.pool or "", {})
        phases[one.phase] = max(one.peak_bytes, phases.get(one.phase, 0))
    return found
