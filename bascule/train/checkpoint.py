"""Snapshots: everything needed to go on, with hashes, and a state of trust (DESIGN section 2.4).

    snapshots/step-00000120/
      model.safetensors  optimizer.safetensors  objective.safetensors   tensors by name
      state.json         step, phase, circumstances, everything that is not a tensor
      manifest.json      sha256 and size of each file above
      trust.json         saved | verified | witnessed | certified | rejected, the reason, the witness; rewritten as trust changes

A snapshot is written under a temporary name, flushed to disk and renamed, so a folder with the right name is whole or was
damaged later; `verify` tells. No pickle anywhere: a snapshot from a suspect machine must not run code.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from bascule.errors import SnapshotError
from bascule.folder import sha256_of, write_atomic, write_json_atomic
from bascule.records import SnapshotState
from bascule.tensors import save_tensors
from bascule.train.objective import Batch
from bascule.train.state import Circumstances, StateDict, differences
from bascule.train.step import Proposal
from bascule.train.storage import (
    read_json,
    read_tensors,
    recover_folders,
    replace_folder,
    sync_folder,
    write_tensors,
)

_RANK: dict[SnapshotState, int] = {
    "rejected": -1,
    "saved": 0,
    "verified": 1,
    "witnessed": 2,
    "certified": 3,
}
_PARTS = ("model", "optimizer", "objective")


@dataclass(frozen=True)
class Snapshot:
    """A snapshot in memory. `extra` is what the caller gave to `save_snapshot`; `warnings` says what differs here and now."""

    path: Path
    step: int
    phase: str
    model: StateDict
    optimizer: StateDict
    objective: StateDict
    extra: dict[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Trust:
    """`witness` is a path relative to the snapshots folder, with its hash: the recorded good step that follows the snapshot."""

    state: SnapshotState
    reason: str = ""
    witness: str | None = None
    witness_sha256: str | None = None


@dataclass(frozen=True)
class Witness:
    """A recorded good step: its batch, and what a good chip made of it at the snapshot's weights."""

    batch: Batch
    loss: float
    grad_norm: float
    grad_norms: dict[str, float]
    grads: dict[str, Tensor]


def path_of(snapshots: Path, step: int) -> Path:
    return snapshots / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@dataclass(frozen=True)
class Frozen:
    """A snapshot's content, copied to the CPU: whoever goes on training cannot change it any more."""

    step: int
    phase: str
    states: dict[str, StateDict]
    extra: dict[str, Any]
    circumstances: dict[str, Any]


def freeze(
    step: int,
    model: StateDict,
    optimizer: StateDict,
    objective: StateDict,
    extra: Mapping[str, Any],
    *,
    phase: str = "",
) -> Frozen:
    """`model`, `optimizer` and `objective` are flat states (see state.StateDict); `extra` is JSON."""
    states = {"model": model, "optimizer": optimizer, "objective": objective}
    return Frozen(
        step,
        phase,
        {
            part: {name: _copied(value) for name, value in state.items()}
            for part, state in states.items()
        },
        copy.deepcopy(dict(extra)),
        Circumstances.now().to_json(),
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)


def save_snapshot(
    folder: Path,
    step: int,
    model: StateDict,
    optimizer: StateDict,
    objective: StateDict,
    extra: Mapping[str, Any],
    *,
    phase: str = "",
) -> Path:
    """Freeze and write at once, for whoever can wait. A run's loop cannot: train/writer does it in a thread."""
    return write(folder, freeze(step, model, optimizer, objective, extra, phase=phase))


def write(folder: Path, frozen: Frozen) -> Path:
    """Write one snapshot durably into `folder` and return its path; a snapshot of the same step is replaced. Raises OSError."""
    recover_folders(folder, sole_writer=True)
    final = path_of(folder, frozen.step)
    temporary = folder / f".{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    values = {
        part: write_tensors(temporary / f"{part}.safetensors", state)
        for part, state in frozen.states.items()
    }
    state = {
        "step": frozen.step,
        "phase": frozen.phase,
        "circumstances": frozen.circumstances,
        "values": values,
        "extra": frozen.extra,
    }
    write_json_atomic(temporary / "state.json", state)
    names = [*(f"{part}.safetensors" for part in _PARTS), "state.json"]
    manifest = {
        name: {"sha256": sha256_of(temporary / name), "bytes": (temporary / name).stat().st_size}
        for name in names
    }
    write_json_atomic(temporary / "manifest.json", manifest)
    _write_trust(temporary, Trust("saved"))
    sync_folder(temporary)
    _settle(temporary, final)
    return final


def sha256(path: Path) -> str:
    """One hash for the snapshot: that of its manifest, which holds the hashes of all files but trust.json."""
    return sha256_of(path / "manifest.json")


def verify(path: Path) -> None:
    """Read every file back and compare its hash. Raises SnapshotError naming the file that is missing or differs."""
    manifest = read_json(path / "manifest.json")
    for name in (*(f"{part}.safetensors" for part in _PARTS), "state.json"):
        entry = manifest.get(name)
        if not isinstance(entry, dict) or "sha256" not in entry:
            raise SnapshotError(
                f"The snapshot '{path}' is damaged: its manifest does not name {name}. Use an older snapshot."
            )
        try:
            found = sha256_of(path / name)
        except OSError as error:
            raise SnapshotError(
                f"The snapshot '{path}' is damaged: {name} cannot be read ({error}). Use an older snapshot."
            ) from None
        if found != entry["sha256"]:
            raise SnapshotError(
                f"The snapshot '{path}' is damaged: {name} has hash {found[:12]}…, its manifest says {str(entry['sha256'])[:12]}…. "
                "Use an older snapshot."
            )
    holds = read_json(path / "state.json").get("step")
    if holds != step_of(path):
        raise SnapshotError(
            f"The snapshot '{path}' is stale: its files are whole and hold step {holds}. Use an older snapshot."
        )


def since_certified(snapshots: Path, step: int, phase: str) -> list[Path]:
    """The snapshots of `phase` before `step`, from the newest certified one on, oldest first; none where none of them is certified.
    One whose trust or phase cannot be read is left out: what it holds is not known."""
    found: list[Path] = []
    # Not all_snapshots: it gives folders back their names, and this process's writer may be between two renames.
    for path in sorted(snapshots.glob("step-*"), reverse=True):
        try:
            state = trust(path).state
            told = read_json(path / "state.json")
        except SnapshotError:
            continue
        if state == "rejected" or told.get("phase") != phase or told.get("step", step) >= step:
            continue
        found.append(path)
        if state == "certified":
            return found[::-1]
    return []


def load(path: Path) -> Snapshot:
    """Verify and read a snapshot; tensors on the CPU. Raises SnapshotError."""
    verify(path)
    state = read_json(path / "state.json")
    parts: dict[str, StateDict] = {
        part: {**read_tensors(path / f"{part}.safetensors")[0], **state["values"][part]}
        for part in _PARTS
    }
    return Snapshot(
        path=path,
        step=int(state["step"]),
        phase=str(state["phase"]),
        extra=state["extra"],
        warnings=tuple(differences(state["circumstances"], Circumstances.now())),
        **parts,
    )


def trust(path: Path) -> Trust:
    """Raises SnapshotError when trust.json is missing or unreadable: an unknown past is not trusted."""
    value = read_json(path / "trust.json")
    if not all(isinstance(entry, str | None) for entry in value.values()):
        raise SnapshotError(
            f"The snapshot '{path}' is damaged: trust.json holds more than texts. Use an older snapshot."
        )
    if value.get("state") not in _RANK:
        raise SnapshotError(
            f"The snapshot '{path}' has an unknown state of trust {value.get('state')!r}; allowed: {', '.join(_RANK)}."
        )
    try:
        return Trust(**value)
    except TypeError:
        raise SnapshotError(
            f"The snapshot '{path}' is damaged: trust.json holds {', '.join(value)}; allowed: "
            f"{', '.join(field.name for field in fields(Trust))}. Use an older snapshot."
        ) from None


def set_trust(
    path: Path, state: SnapshotState, reason: str = "", *, witness: Path | None = None
) -> Trust:
    """Move a snapshot's trust. It may rise, or fall to `rejected`; a rejected snapshot stays rejected (SnapshotError).

    A witness given earlier is kept when none is given now.
    """
    before = trust(path)
    if before.state == "rejected" and state != "rejected":
        raise SnapshotError(
            f"The snapshot '{path}' was rejected ({before.reason}) and cannot become {state}. Use an older one."
        )
    if state != "rejected" and _RANK[state] < _RANK[before.state]:
        state = before.state
    after = Trust(state, reason or before.reason, before.witness, before.witness_sha256)
    if witness is not None:
        after = Trust(
            state, after.reason, os.path.relpath(witness, path.parent), sha256_of(witness)
        )
    _write_trust(path, after)
    return after


def witness(path: Path, proposal: Proposal, reason: str, done: Callable[[str], None]) -> None:
    """Record the good step after the snapshot as its witness, and then `done` with the snapshot's hash."""
    kept = write_witness(path / "witness.safetensors", proposal)
    set_trust(path, "witnessed", reason, witness=kept)
    done(sha256(path))


def certify(path: Path, reason: str, done: Callable[[str], None]) -> None:
    """Call a witnessed snapshot certified, and then `done` with its hash."""
    set_trust(path, "certified", reason)
    done(sha256(path))


def all_snapshots(snapshots: Path) -> list[Path]:
    """Every finished snapshot folder, oldest first, whatever its trust."""
    recover_folders(snapshots)
    return sorted(path for path in snapshots.glob("step-*") if path.is_dir())


def newest(snapshots: Path, at_least: SnapshotState = "certified") -> tuple[Path | None, list[str]]:
    """The newest whole snapshot trusted `at_least` so much, and a sentence for each damaged one that was passed over."""
    skipped: list[str] = []
    for path in reversed(all_snapshots(snapshots)):
        try:
            if _RANK[trust(path).state] < _RANK[at_least]:
                continue
            verify(path)
        except SnapshotError as error:
            skipped.append(str(error))
            continue
        return path, skipped
    return None, skipped


def prune(
    snapshots: Path,
    keep: int,
    at_least: SnapshotState = "certified",
    *,
    most_bytes: float = math.inf,
) -> list[Path]:
    """Delete snapshots older than the newest `keep` trusted ones, fewer where all take more than `most_bytes`, and what killed writers
    left. Returns what was deleted.

    The newest trusted snapshot is never deleted, nor anything newer than the oldest one kept: those wait for their certificates.
    """
    trusted = [path for path in all_snapshots(snapshots) if _is_trusted(path, at_least)]
    kept = trusted[-max(1, keep) :]
    while len(kept) > 1 and bytes_of(snapshots, kept[0]) > most_bytes:
        kept = kept[1:]
    gone = [path for path in all_snapshots(snapshots) if kept and path < kept[0]]
    gone += [
        path for path in snapshots.glob(".step-*") if not path.name.endswith(f"-{os.getpid()}")
    ]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return gone


def bytes_of(snapshots: Path, oldest: Path | None = None) -> int:
    """What the snapshots from `oldest` on take on the disk, witnesses included."""
    found = [path for path in all_snapshots(snapshots) if oldest is None or path >= oldest]
    return sum(file.stat().st_size for path in found for file in path.iterdir())


def write_witness(path: Path, proposal: Proposal) -> Path:
    """Record a good step in one safetensors file: batch, loss, gradients and their norms."""
    tensors = {f"batch/{name}": tensor for name, tensor in proposal.batch.tensors.items()}
    tensors |= {
        f"grad/{name}": grad.detach().cpu().contiguous() for name, grad in proposal.grads.items()
    }
    header = {
        "phase": proposal.phase,
        "step": proposal.step,
        "loss": proposal.loss,
        "grad_norm": proposal.grad_norm,
        "grad_norms": {name: float(grad.norm()) for name, grad in proposal.grads.items()},
        "notes": proposal.batch.notes,
    }
    write_atomic(
        path,
        lambda temporary: save_tensors(tensors, temporary, {"bascule": json.dumps(header)}),
    )
    return path


def read_witness(path: Path, sha256_expected: str | None = None) -> Witness:
    """Raises SnapshotError when the file is missing, torn, or not the one whose hash was recorded."""
    if sha256_expected is not None and path.exists() and sha256_of(path) != sha256_expected:
        raise SnapshotError(
            f"The witness '{path}' is not the one its snapshot names (hash differs). Use an older snapshot."
        )
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata["bascule"])
    batch = {
        name.removeprefix("batch/"): t for name, t in tensors.items() if name.startswith("batch/")
    }
    return Witness(
        batch=Batch(header["phase"], header["step"], batch, header["notes"]),
        loss=header["loss"],
        grad_norm=header["grad_norm"],
        grad_norms=header["grad_norms"],
        grads={
            name.removeprefix("grad/"): t for name, t in tensors.items() if name.startswith("grad/")
        },
    )


def _is_trusted(path: Path, at_least: SnapshotState) -> bool:
    try:
        return _RANK[trust(path).state] >= _RANK[at_least]
    except SnapshotError:
        return False


def _write_trust(path: Path, value: Trust) -> None:
    write_json_atomic(path / "trust.json", vars(value))


def _same_content(one: Path, other: Path) -> bool:
    try:
        verify(other)
        trust(other)
    except SnapshotError:
        return False
    return sha256(one) == sha256(other)


def _settle(temporary: Path, final: Path) -> None:
    """Give the new snapshot its name. An equal one that is there already stays, with the trust it earned."""
    if final.exists() and _same_content(temporary, final):
        shutil.rmtree(temporary)
        if trust(final).state == "rejected":
            _write_trust(final, Trust("saved"))
    else:
        replace_folder(temporary, final)
