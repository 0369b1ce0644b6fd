"""Is that worker alive, stuck, dead or only slow to start? Told apart in seconds, from files and exit codes. No torch.

A worker beats from its own loop, never from a thread beside it: so a beat is progress and not just life. The supervisor reads the
file and the process's state and judges. A worker that ended is classified from the word it left and its exit code, never from
log text (DESIGN, Processes).
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bascule import errors
from bascule.guard import host
from bascule.records import Attribution

State = Literal["starting", "alive", "hung", "slow start"]
STARTING = "starting"
"""Phase of the beats before a worker is at work: they may be `start_timeout_s` apart."""

STARVED = 10.0
"""So many times its limit a worker may be silent while the host runs others. A hung one may be ready to run all the while: spinning."""

STACK_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class Beat:
    """A worker's last sign of progress. `time_s` is Unix time; `phase` a short word (`starting`, `sft`, `snapshot`, `evaluate`)."""

    pid: int
    step: int
    phase: str
    time_s: float


@dataclass(frozen=True)
class Health:
    """The watchdog's answer. `silent_s`: seconds without progress, those in which the host ran others instead of it left out."""

    state: State
    silent_s: float
    reason: str

    @property
    def must_end(self) -> bool:
        return self.state in ("hung", "slow start")


def beat(path: Path, step: int, phase: str) -> None:
    """Rewrite the heartbeat file. Renamed into place, so a reader never sees half a beat; not flushed: a lost one is harmless."""
    value = Beat(os.getpid(), step, phase, time.time())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(value)), encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> Beat | None:
    """The last beat; None when the worker has not beaten yet or the file is damaged (then silence will tell)."""
    try:
        return Beat(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


class Watchdog:
    """Watches one worker from its start. Silence is counted by this process's clock, so a wrong clock in the worker does not
    matter. Beats of another pid (an earlier launch) are not progress. Time in which it was ready and the host ran others is not
    silence: on a crowded machine a worker of low priority may not get a second of a minute. `withheld_s` tells it, by pid."""

    def __init__(
        self,
        path: Path,
        *,
        hang_timeout_s: float,
        start_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        withheld_s: Callable[[int], float] = host.withheld_from_s,
    ) -> None:
        self.path = path
        self.hang_timeout_s = hang_timeout_s
        self.start_timeout_s = start_timeout_s
        self._clock = clock
        self._withheld_s = withheld_s
        self._withheld_before = 0.0
        self._last: Beat | None = None
        self._last_change = clock()

    def judge(self, pid: int) -> Health:
        """How is the worker `pid`, which has not ended?"""
        found, now = read(self.path), self._clock()
        if found is not None and found.pid == pid and found != self._last:
            self._last, self._last_change = found, now
            self._withheld_before = self._withheld_s(pid)
        silent = now - self._last_change
        starved = max(0.0, self._withheld_s(pid) - self._withheld_before)
        silent = max(silent - starved, silent / STARVED)
        if self._last is None or self._last.phase == STARTING:
            if silent <= self.start_timeout_s:
                return Health("starting", silent, "not at work yet")
            reason = f"not at work within {self.start_timeout_s:g} s of its start"
            return Health("slow start", silent, reason)
        where = f"step {self._last.step} ({self._last.phase})"
        if silent <= self.hang_timeout_s:
            return Health("alive", silent, where)
        reason = f"no progress for {silent:.1f} s at {where}; allowed {self.hang_timeout_s:g} s"
        return Health("hung", silent, reason)


# --- stacks ---------------------------------------------------------------------------------------------------------------


def arm_stacks(path: Path) -> None:
    """In the worker: on SIGUSR1 write every thread's Python stack to `path`, even while C code holds the interpreter lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - must stay open: the handler writes to its descriptor
    faulthandler.register(STACK_SIGNAL, file=file, all_threads=True)
    _open_files.append(file)


_open_files: list[object] = []


def capture_stacks(pid: int, path: Path, *, wait_s: float = 2.0) -> str:
    """In the supervisor: ask `pid` for its stacks and return them; an empty string when it does not answer (frozen, gone)."""
    before = path.stat().st_size if path.exists() else 0
    try:
        os.kill(pid, STACK_SIGNAL)
    except ProcessLookupError:
        return ""
    deadline = time.monotonic() + wait_s
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = path.stat().st_size if path.exists() else 0
        if now > before and now == size:
            return path.read_text(encoding="utf-8", errors="replace")[before:]
        size = now
    return ""


def standing_at(stacks: str) -> str:
    """The innermost frame of the main thread in what faulthandler wrote: `function (file:line)`; an empty string without one.

    The main thread is the one that took the signal: faulthandler calls it the current one."""
    _, found, main = stacks.rpartition("Current thread")
    frame = re.search(r'File "([^"]*)", line (\d+) in (\S+)', main if found else "")
    return f"{frame[3]} ({Path(frame[1]).name}:{frame[2]})" if frame else ""


# --- endings --------------------------------------------------------------------------------------------------------------

ATTRIBUTIONS: dict[str, Attribution] = {
    "ChipCondemned": "persistent chip fault",
    "RollbackNeeded": "transient chip fault",
    "OutOfMemory": "capacity",
    "OperatorMissing": "software",
    "AcceleratorUnavailable": "software",
    "OwnFault": "software",
}
"""Whose fault an ending is, where no incident says it; all others: unknown."""


@dataclass(frozen=True)
class Ending:
    """Why a worker ended. `error` is the class name of the error it named, "Hang" where it was ended for its silence, "Death"
    where it left no word, "OwnFault" for a traceback, None where it finished. `stacks`: where a silent one stood."""

    error: str | None
    message: str
    exit_code: int
    incident_id: str | None = None
    stacks: str = ""

    @property
    def attribution(self) -> Attribution:
        return ATTRIBUTIONS.get(self.error or "", "unknown")


def write_ending(path: Path, error: errors.BasculeError) -> None:
    """In the worker, on the way out: leave the reason as a value, so that nobody has to parse a log."""
    value = {
        "error": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code,
        "incident_id": getattr(error, "incident_id", None),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def classify_exit(exit_code: int, ending_file: Path, *, health: Health | None = None) -> Ending:
    """Why did it end? The word it left, if it belongs to this exit code; else why we ended it (`health`); else the code."""
    if exit_code == errors.EXIT_OK:
        return Ending(None, "finished", exit_code)
    written = _read_ending(ending_file)
    if written is not None and written.exit_code == exit_code:
        return written
    if health is not None and health.must_end:
        return Ending("Hang", health.reason, exit_code)
    if exit_code == errors.BasculeError.exit_code:
        return Ending("OwnFault", "ended by an error of our own, not the chip's", exit_code)
    return Ending("Death", _last_of(exit_code), exit_code)


def _last_of(exit_code: int) -> str:
    if exit_code >= 0:
        return f"died with exit code {exit_code} and left no word: a runtime or driver ended it"
    number = -exit_code
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    if number == signal.SIGKILL:
        return f"killed ({name}): the device vanished, the host ran out of memory, or someone killed it"
    if number in (signal.SIGINT, signal.SIGTERM):
        return f"stopped by {name} from outside"
    return f"crashed with {name}: native code of a library or driver failed"


def _read_ending(path: Path) -> Ending | None:
    try:
        return Ending(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
