"""Snapshots reach the disk while training goes on: the state is copied at its step, one thread writes, flushes, hashes, renames.

Training stands still for the copy alone. Jobs run in the order in which they were given, so a snapshot is on disk before it is
verified, and verified before it is certified. At most one snapshot is in flight: the next one waits for it. What fails in the
thread is raised in the loop at its next `check`, and what was queued behind it is dropped: nothing is certified that was not
written. A process that is killed leaves an unfinished folder under a temporary name, which nobody takes for a snapshot.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

from bascule.train import checkpoint
from bascule.train.state import StateDict
from bascule.train.step import Proposal

WAIT_S = 2.0
"""How often a wait for the disk says that it is still waiting."""


def _nothing(*_: object) -> None:
    return None


class SnapshotWriter:
    """`on_saved(step, path)` runs in the thread once a snapshot is durable, `after_each` there after every job; `on_wait` in the
    loop, while it has to wait."""

    def __init__(
        self,
        on_saved: Callable[[int, Path], None] = _nothing,
        on_wait: Callable[[], None] = _nothing,
        after_each: Callable[[], None] = _nothing,
    ) -> None:
        self._on_saved = on_saved
        self._after_each = after_each
        self._on_wait = on_wait
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._jobs: deque[futures.Future[None]] = deque()
        self._failed = False

    def save(
        self,
        folder: Path,
        step: int,
        model: StateDict,
        optimizer: StateDict,
        objective: StateDict,
        extra: Mapping[str, Any],
        *,
        phase: str = "",
    ) -> Path:
        """As checkpoint.save_snapshot, but returns the snapshot's path before anything lies there."""
        self.wait()
        frozen = checkpoint.freeze(step, model, optimizer, objective, extra, phase=phase)

        def work() -> None:
            self._on_saved(step, checkpoint.write(folder, frozen))

        self._give(work)
        return checkpoint.path_of(folder, step)

    def witness(
        self, path: Path, proposal: Proposal, reason: str, done: Callable[[str], None]
    ) -> None:
        """As checkpoint.witness, once the snapshot at `path` is on disk. The gradients are copied now."""
        grads = {name: grad.detach().to("cpu", copy=True) for name, grad in proposal.grads.items()}
        kept = dataclasses.replace(proposal, grads=grads)
        self._give(lambda: checkpoint.witness(path, kept, reason, done))

    def certify(self, path: Path, reason: str, done: Callable[[str], None]) -> None:
        self._give(lambda: checkpoint.certify(path, reason, done))

    def check(self) -> None:
        """Raise what failed since the last look (OSError, SnapshotError). Does not wait."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Until everything given so far is on disk. Raises as `check`."""
        while self._jobs:
            if not futures.wait([self._jobs[0]], timeout=WAIT_S).done:
                self._on_wait()
            self.check()

    def _give(self, work: Callable[[], None]) -> None:
        self._jobs.append(self._thread.submit(self._unless_failed, work))

    def _unless_failed(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        self._failed = True
        work()
        self._after_each()
        self._failed = False
