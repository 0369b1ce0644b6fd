"""What the host took away from this thread, so that a loaded machine is not mistaken for a slow chip."""

from __future__ import annotations

from pathlib import Path

SCHEDULER = Path("/proc/thread-self/schedstat")


def withheld_s() -> float:
    """Seconds since this thread began in which it was ready to run and the scheduler ran others. Where the system does not tell
    (not Linux, or built without it) 0.0: then all time counts as the chip's."""
    try:
        return int(SCHEDULER.read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0
