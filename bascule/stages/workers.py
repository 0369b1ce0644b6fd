"""The supervisor's hold on its worker processes: start, ask to end, end. No torch, no decisions."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bascule.config import whole_environment


@dataclass
class Worker:
    """One child process with its log file. Its stdin is a pipe that closes when this process dies (see stages/child)."""

    kind: str
    pool: str
    process: subprocess.Popen[bytes]
    log: Path
    started_s: float = field(default_factory=time.time)

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

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


def start(kind: str, arguments: Sequence[str], *, pool: str, log: Path, threads: int) -> Worker:
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
    return Worker(kind=kind, pool=pool, process=process, log=log)
