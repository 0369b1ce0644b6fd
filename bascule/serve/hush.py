"""Lines of log that any client can cause, as often as it likes: told once a minute with their number, so that nobody can fill a disk."""

from __future__ import annotations

import logging
import time
from collections import Counter

ANYONES = frozenset({"Invalid HTTP request received.", "socket.send() raised exception."})
EVERY_S = 60.0


class Hush(logging.Filter):
    """`every_s` between two lines of the same words."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        super().__init__()
        self._every_s = every_s
        self._told_s: dict[str, float] = {}
        self._kept: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        words = record.getMessage()
        if words not in ANYONES:
            return True
        now = time.monotonic()
        if now - self._told_s.get(words, -self._every_s) < self._every_s:
            self._kept[words] += 1
            return False
        self._told_s[words] = now
        if again := self._kept.pop(words, 0):
            record.msg, record.args = f"{words} ({again} more since the last line)", ()
        return True


def hush() -> None:
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(Hush())
