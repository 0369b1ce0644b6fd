"""Is that worker alive, stuck, dead or only slow to start? Told apart in seconds, from files and exit codes. No torch.

A worker beats: it rewrites one small JSON file with its step, so that a beat shows progress and not just life. The supervisor
reads the file and the process's state and judges. A worker that ended is classified from its exit code, its last beat and its
incident file, never from log text (DESIGN, Processes).
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bascule import errors
from bascule.records import Attribution

State = Literal["starting", "alive", "finished", "hung", "dead", "slow start"]
STACK_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class Beat:
    """A worker's last sign of progress. `time_s` is Unix time; `phase` a short word (`starting`, `sft`, `snapshot`, `done`).

    `detail` names what runs right now when the worker knows it: a module, a collective.
    """

    pid: int
    step: int
    phase: str
    time_s: float
    detail: str = ""


@dataclass(frozen=True)
class Health:
    """The watchdog's answer. `silent_s`: seconds without progress."""

    state: State
    silent_s: float
    reason: str

    @property
    def must_end(self) -> bool:
        return self.state in ("hung", "slow start", "dead")


@dataclass(frozen=True)
class Ending:
    """Why a worker ended. `exit_code` is what bascule would end with; `retry`: starting it again on this pool makes sense."""

    reason: str
    attribution: Attribution
    exit_code: int
    retry: bool
    incident_id: str | None = None


def beat(path: Path, step: int, phase: str, detail: str = "") -> None:
    """Rewrite the heartbeat file. Renamed into place, so a reader never sees half a beat; not flushed: a lost one is harmless."""
    value = Beat(os.getpid(), step, phase, time.time(), detail)
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
    """Watches one worker. Remembers the last progress by its own clock, so a wrong clock in the worker does not matter.

    Progress is a change of (pid, step, phase, detail): a beat that only shows a later time is a thread that outlived its loop.
    """

    def __init__(
        self,
        path: Path,
        *,
        hang_timeout_s: float,
        start_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.hang_timeout_s = hang_timeout_s
        self.start_timeout_s = start_timeout_s
        self._clock = clock
        self._started = clock()
        self._last_change = self._started
        self._seen: tuple[int, int, str, str] | None = None
        self._slowest = 0.0

    def judge(self, pid: int, exit_code: int | None) -> Health:
        """`exit_code` None while the process runs (Popen.poll). Beats of another pid (a previous launch) are not progress."""
        found = read(self.path)
        now = self._clock()
        if found is not None and found.pid == pid:
            mark = (found.pid, found.step, found.phase, found.detail)
            if mark != self._seen:
                if self._seen is not None:
                    self._slowest = max(self._slowest, now - self._last_change)
                self._seen, self._last_change = mark, now
        silent = now - self._last_change
        if exit_code is not None:
            return Health(
                "finished" if exit_code == 0 else "dead",
                silent,
                f"the process ended with code {exit_code}",
            )
        if self._seen is None:
            return self._judge_start(silent)
        step, phase = self._seen[1], self._seen[2]
        if silent > self.hang_timeout_s:
            return Health(
                "hung",
                silent,
                f"no progress for {silent:.1f} s at step {step} ({phase}); allowed {self.hang_timeout_s:g} s",
            )
        return Health("alive", silent, f"step {step} ({phase})")

    def _judge_start(self, silent: float) -> Health:
        if silent > self.start_timeout_s:
            return Health(
                "slow start",
                silent,
                f"no first progress within {self.start_timeout_s:g} s; it is not at work yet, so not a hang",
            )
        return Health("starting", silent, "no progress yet")

    @property
    def slowest_s(self) -> float:
        """The longest quiet time between two signs of progress so far: what `hang_timeout_s` must stay well above."""
        return self._slowest


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


# --- endings --------------------------------------------------------------------------------------------------------------

_BY_EXIT_CODE: dict[int, tuple[str, Attribution, bool]] = {
    errors.EXIT_OK: ("finished", "unknown", False),
    errors.UsageError.exit_code: ("the recipe or the command line is refused", "software", False),
    errors.CheckFailed.exit_code: ("a check said no", "unknown", False),
    errors.GuardStopped.exit_code: ("the guard stopped it", "unknown", False),
    errors.DeviceFault.exit_code: ("the chip failed", "persistent chip fault", False),
    errors.OutOfMemory.exit_code: ("memory is exhausted", "capacity", False),
    errors.Preempted.exit_code: ("stopped on request after a snapshot", "unknown", False),
    errors.EXIT_SIGINT: ("interrupted", "unknown", False),
    errors.EXIT_SIGTERM: ("terminated", "unknown", False),
}


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


def classify_exit(
    exit_code: int,
    last: Beat | None,
    ending_file: Path | None = None,
    *,
    health: Health | None = None,
) -> Ending:
    """Why did it end? In this order: what the worker wrote itself, why we killed it (`health`), the signal, the exit code."""
    where = f" at step {last.step} ({last.phase})" if last is not None else " before its first step"
    written = _read_ending(ending_file)
    if written is not None and written["exit_code"] == exit_code:
        return _from_written(written)
    if health is not None and health.state in ("hung", "slow start"):
        return Ending(
            f"{health.state}: {health.reason}", "unknown", errors.DeviceFault.exit_code, retry=True
        )
    if exit_code < 0:
        return _from_signal(-exit_code, where)
    if exit_code in _BY_EXIT_CODE:
        reason, attribution, retry = _BY_EXIT_CODE[exit_code]
        return Ending(reason + where, attribution, exit_code, retry)
    if exit_code == errors.BasculeError.exit_code:
        return Ending(
            f"an error of our own{where}; the log holds the traceback", "software", 1, retry=False
        )
    return Ending(
        f"died with code {exit_code}{where}, no reason given: a runtime or driver ended the process",
        "unknown",
        errors.DeviceFault.exit_code,
        retry=True,
    )


def _from_written(written: dict[str, object]) -> Ending:
    name, exit_code = str(written["error"]), int(str(written["exit_code"]))
    attributions: dict[str, Attribution] = {
        "OperatorMissing": "software",
        "AcceleratorUnavailable": "software",
        "ChipCondemned": "persistent chip fault",
        "OutOfMemory": "capacity",
        "RollbackNeeded": "transient chip fault",
    }
    incident = written.get("incident_id")
    return Ending(
        reason=str(written["message"]),
        attribution=attributions.get(name, _BY_EXIT_CODE.get(exit_code, ("", "unknown", False))[1]),
        exit_code=exit_code,
        retry=name in ("RollbackNeeded", "Preempted"),
        incident_id=None if incident is None else str(incident),
    )


def _from_signal(number: int, where: str) -> Ending:
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    if number == signal.SIGKILL:
        reason = f"killed (SIGKILL){where}: the device vanished, the host ran out of memory, or someone killed it"
        return Ending(reason, "unknown", errors.DeviceFault.exit_code, retry=True)
    if number in (signal.SIGINT, signal.SIGTERM):
        return Ending(f"stopped by {name}{where}", "unknown", 128 + number, retry=False)
    return Ending(
        f"crashed with {name}{where}: native code of a library or driver failed",
        "software",
        errors.DeviceFault.exit_code,
        retry=True,
    )


def _read_ending(path: Path | None) -> dict[str, object] | None:
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return (
        value
        if isinstance(value, dict) and {"error", "message", "exit_code"} <= value.keys()
        else None
    )


def guilty_ranks(beats: Sequence[Beat | None]) -> list[int]:
    """Of ranks that stopped together, those that hold the others up: the ones furthest behind, or that never beat.

    Ranks at the same step wait for each other in a collective, so when all stand at one step nobody is named.
    """
    steps = [-1 if found is None else found.step for found in beats]
    behind = min(steps, default=0)
    guilty = [rank for rank, step in enumerate(steps) if step == behind]
    return [] if len(guilty) == len(steps) else guilty
