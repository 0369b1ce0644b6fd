"""Where everything of a run lies: `out/NAME/` and the names inside it. Paths only; who writes what is said beside each name.

Values between stages and processes pass through these files, never as objects (DESIGN section 2.1).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UMASK = os.umask(0)
os.umask(_UMASK)


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Creating the object touches nothing; `create()` makes the directories."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe (JSON): every setting of the run, defaults filled in. Written by stages/run."""
        return self.root / "recipe.json"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def snapshots(self) -> Path:
        """`step-00000120/` each; written by train/checkpoint, trust states in each folder's `trust.json`."""
        return self.root / "snapshots"

    @property
    def incidents(self) -> Path:
        """`<incident_id>/incident.json` and the tensors needed to replay it; written by guard."""
        return self.root / "incidents"

    @property
    def model(self) -> Path:
        """The finished model in Hugging Face layout, the tokenizer beside it."""
        return self.root / "model"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of a run that does not use bascule's own closed vocabulary; written before the workers start."""
        return self.root / "tokenizer"

    @property
    def weights(self) -> Path:
        """Live weights on their way from the trainer to the rollout engine; written by place/sync."""
        return self.root / "weights"

    @property
    def heartbeats(self) -> Path:
        """`<worker>.json`: progress of each worker, rewritten in place; read by guard/watchdog."""
        return self.root / "heartbeats"

    @property
    def logs(self) -> Path:
        """stdout and stderr of each worker, per attempt; for people, never parsed."""
        return self.root / "logs"

    @property
    def ground_truth(self) -> Path:
        """What simulated chips really did. Drills and tests read it; guard, qualify and fallback may not."""
        return self.root / "ground_truth"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def create(self) -> RunFolder:
        for path in (
            self.root,
            self.snapshots,
            self.incidents,
            self.weights,
            self.heartbeats,
            self.logs,
        ):
            path.mkdir(parents=True, exist_ok=True)
        return self


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary_path)`, flush to disk, then rename onto `path`: readers see the old file or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(
            temporary, 0o666 & ~_UMASK
        )  # mkstemp makes files private; a served model is read by other users
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    write_atomic(path, lambda temporary: _dump_json(temporary, value))


def _dump_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
