"""One supervisor a run folder. Two locks: one inside the folder, which holds whatever path leads there, and one beside it, which holds
when the folder is deleted under its supervisor.

A deleted folder takes its lock along, so whoever begins anew under its name would lock a new one, while the first supervisor, who looks
for its folder only between two pieces of work, still writes by that name. `.NAME.lock` in the parent outlives the folder: the new
supervisor is refused until the first has noticed and ended. The kernel drops both locks when their process dies, so a killed run never
leaves a stale lock, at most an empty name.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from bascule.errors import UsageError
from bascule.folder import RunFolder


class Hold:
    """The folder's lock, as long as the folder lasts."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path = path
        self._file = file

    def check(self) -> bool:
        """Raises UsageError when the lock that is held is not the folder's any more; else False, so that it can stand in a condition."""
        if not _is_at(self._file, self._path):
            raise UsageError(
                f"The run folder {self._path.parent} was deleted or replaced while process {os.getpid()} worked in it; it stops "
                "and writes nothing more. Run the command again to begin anew."
            )
        return False


@contextmanager
def sole_supervisor(folder: RunFolder) -> Iterator[Hold]:
    """Hold the folder, which is made where there is none. Raises UsageError naming the process that holds it."""
    with ExitStack() as stack:
        root = folder.root.resolve()
        root.parent.mkdir(parents=True, exist_ok=True)
        beside = root.parent / f".{root.name}.lock"
        # Where others own the parent the run goes without: it can still not be started twice, unless the folder is deleted under it.
        if os.access(root.parent, os.W_OK):
            stack.enter_context(_locked(beside, folder))
            stack.callback(beside.unlink, missing_ok=True)
        folder.root.mkdir(parents=True, exist_ok=True)
        path = folder.root / "lock"
        hold = Hold(path, stack.enter_context(_locked(path, folder)))
        hold.check()
        yield hold


@contextmanager
def _locked(path: Path, folder: RunFolder) -> Iterator[IO[str]]:
    """The file at `path`, open and locked, this process's number in it."""
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UsageError(
                    f"The run folder {folder.root} is in use by process {file.read().strip() or 'unknown'}. "
                    "Wait for it, stop it (SIGTERM snapshots first), or give this run another --name."
                ) from None
            if not _is_at(file, path):
                continue  # its holder took the name away between our opening and our locking
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield file
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
