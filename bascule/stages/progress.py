"""Follow a ledger while others write it: new records as they come, and one line of progress now and then."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bascule.ledger import parse_line
from bascule.records import AnyRecord, StepStats
from bascule.stages.answer import duration, say
from bascule.terminal import draws, width_of


class LedgerTail:
    """Records appended since the last call. Only whole lines are taken, so a line being written is left for the next call."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self.path = path
        self._offset = 0 if from_start or not path.exists() else path.stat().st_size

    def new(self) -> list[AnyRecord]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [parse_line(line, self.path) for line in data[:end].split(b"\n") if line]


class ProgressBar:
    """`[#######·······]  12/31  numerics.backward[train]  ETA 20s` on the last line of a terminal; elsewhere nothing."""

    WIDTH = 24

    def __init__(self) -> None:
        self._on = draws(sys.stderr)
        self._began_s = time.monotonic()

    def show(self, what: str, done: float, total: int) -> None:
        """`done` of `total`, fractions allowed. The time left is guessed from the time so far."""
        if not self._on:
            return
        share = done / max(total, 1)
        spent_s = time.monotonic() - self._began_s
        eta = f"  ETA {duration(spent_s * (1 - share) / share)}" if share > 0.05 else ""
        full = round(self.WIDTH * share)
        bar = "#" * full + "·" * (self.WIDTH - full)
        line = f"[{bar}] {int(done):3d}/{total}  {what}{eta}"
        room = (
            width_of(sys.stderr) or len(line) + 1
        ) - 1  # a line that breaks cannot be taken back
        print(f"\r\x1b[K{line[:room]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Before anything else is said."""
        if self._on:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class ProgressLine:
    """`sft 120/950  loss 0.412  |g| 0.8  18.9k tok/s  ETA 2m 10s`, at most every `every_s` seconds."""

    def __init__(self, total_steps: int, *, every_s: float = 5.0) -> None:
        self.total_steps = total_steps
        self.every_s = every_s
        self._said_s = 0.0
        self._recent: list[StepStats] = []

    def show(self, stats: StepStats) -> None:
        self._recent = [old for old in self._recent if old.phase == stats.phase][-19:] + [stats]
        now = time.monotonic()
        if now - self._said_s < self.every_s and stats.step != self.total_steps:
            return
        self._said_s = now
        seconds = sum(one.seconds for one in self._recent)
        rate = sum(one.tokens for one in self._recent) / max(seconds, 1e-9)
        eta_s = (self.total_steps - stats.step) * seconds / len(self._recent)
        rewards = [one.reward for one in self._recent if one.reward is not None]
        reward = f"  reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
        bits = stats.metrics.get("bits_per_byte")
        read = "" if bits is None else f"  {bits:.3f} bits/byte"
        say(
            f"[{stats.pool}] {stats.phase} {stats.step}/{self.total_steps}  loss {stats.loss:.4f}{reward}{read}"
            f"  |g| {stats.grad_norm:.3f}  {_thousands(rate)} tok/s  ETA {duration(eta_s)}"
        )


def _thousands(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"
