"""What a verb answers: data for `--json`, text for people, an exit code. And how stages speak while they work."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from bascule.terminal import laid_out, width_of


@dataclass(frozen=True)
class Answer:
    text: str
    data: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0


def say(line: str) -> None:
    """One line of progress, to stderr, with the local time; stdout is kept for the answer. In one write: pools are examined side by side."""
    clock = time.strftime("%H:%M:%S ")
    told = laid_out(clock + line, width_of(sys.stderr), indent=len(clock))
    print(f"{told}\n", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`1h 12m`, `3m 05s`, `4.2s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(round(seconds)), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"
