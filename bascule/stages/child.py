"""The first lines of every worker process: die with the supervisor, leave Ctrl-C to it, then be the worker named.

    python -m bascule.stages.child trainer --run out/demo --attempt 1 --pool ascend --socket /tmp/x/s
    python -m bascule.stages.child rollout --run out/demo --pool ascend --socket /tmp/x/s

The supervisor holds the other end of stdin. When it is killed, the pipe closes and the worker ends at once: an orphan that
went on training would write into a run that someone else may be resuming.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading

WORKERS = {"trainer": "bascule.stages.trainer", "rollout": "bascule.place.rollout"}
EXIT_ORPHANED = 70


def _end_with_parent() -> None:
    # os.read, not sys.stdin: a thread holding stdin's buffer lock makes the interpreter abort when it shuts down.
    while os.read(0, 4096):
        pass
    os._exit(EXIT_ORPHANED)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()
    worker = importlib.import_module(WORKERS[sys.argv[1]])
    return int(worker.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
