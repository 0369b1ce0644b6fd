"""The supervisor's hold on its worker processes: start, ask to end, end. No torch, no decisions."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bascule.config.environment import whole_environment
from bascule.guard.watchdog import Health, Watchdog

POLL_S = 0.1  # how often the supervisor looks


@dataclass
class Worker:
    """One child process with its log file. Its stdin is a pipe that closes when this process dies (see stages/child)."""

    kind: str
    pool: str
    process: subprocess.Popen[bytes]
    log: Path
    watchdog: Watchdog

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    @property
    def health(self) -> Health:
        """Of a worker that has not ended."""
        return self.watchdog.judge(self.process.pid)

    def ask_to_stop(self) -> None:
        """SIGTERM: a trainer finishes its step, takes a snapshot and exits 75."""
        if self.returncode is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.returncode is None:
            self.process.kill()
        self.process.wait()

    def last_words(self, lines: int = 12) -> str:
        """The end of the log, for people; nothing is decided from it."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


def start(
    kind: str, arguments: Sequence[str], *, pool: str, log: Path, threads: int, watchdog: Watchdog
) -> Worker:
    """Start `bascule.stages.child KIND ARGUMENTS`. OpenMP's thread count is set before torch loads: later is too late."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **whole_environment(),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bascule.stages.child", kind, *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Worker(kind, pool, process, log, watchdog)
