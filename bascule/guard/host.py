"""What the host took away from a thread, so that a loaded machine is not mistaken for a slow chip. The system's own counts."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path

SCHEDULER = Path("/proc/thread-self/schedstat")

_open = threading.local()  # read at every step: opening the file costs ten times what reading does


def withheld_s() -> float:
    """Seconds since this thread began in which it was ready to run and the scheduler ran others. Where the system does not tell
    (not Linux, or built without it) 0.0: then all time counts as the chip's."""
    try:
        if getattr(_open, "of", None) != (SCHEDULER, os.getpid()):
            _open.file, _open.of = SCHEDULER.open("rb", buffering=0), (SCHEDULER, os.getpid())
        _open.file.seek(0)
        return int(_open.file.read().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0


def own_time_s() -> float:
    """A clock that stands still while the host withholds this thread: for differences only."""
    return time.perf_counter() - withheld_s()


def withheld_from_s(pid: int) -> float:
    """The same of another process's main thread, which drives it. 0.0 where the system does not tell, or the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0


def pages_fetched() -> int:
    """How many pages this thread had to wait for a disk for since it began: on a machine that is short of memory they come back one
    by one. 0 where the system does not count them by thread."""
    who = getattr(resource, "RUSAGE_THREAD", None)
    return 0 if who is None else resource.getrusage(who).ru_majflt
