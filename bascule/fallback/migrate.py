"""Which snapshot does a run go back to? The newest certified one that reads back whole; everything later is left behind. No torch.

The supervisor asks this before it starts a trainer on the next pool. A snapshot's folder is laid out by train/checkpoint; only
its two JSON files and the hashes of the rest are needed here. Snapshots are the same bytes for every kind of chip, so nothing is
converted; that the new chip computes the same from them is proven by fallback/verify.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bascule.folder import sha256_of, write_json_atomic
from bascule.ledger import Ledger
from bascule.records import SnapshotEvent, SnapshotState

_TRUST = ("verified", "witnessed", "certified")
"""States in which a snapshot may be gone back to, in rising trust."""


@dataclass(frozen=True)
class Choice:
    """Where to go on from. `path` is a snapshot folder; at step 0 it may not exist: then the run starts afresh from its seed.

    `passed_over`: a sentence for each certified snapshot that is damaged; `rejected`: steps of snapshots left behind.
    """

    step: int
    path: Path
    passed_over: tuple[str, ...] = ()
    rejected: tuple[int, ...] = ()


class Damaged(Exception):
    """A snapshot that cannot be used, and why. Stays in this room: the next older snapshot answers it."""


def choose(snapshots: Path, ledger: Ledger, *, trusted: SnapshotState = "certified") -> Choice:
    """Find the snapshot to go on from, reject the later ones, and record both. With no certified snapshot: step 0.

    `trusted`: what is enough; a run without a guard certifies nothing, there a snapshot that was read back must do.

    Steps of an uncertified past are not trusted, even when their files are whole: corruption noticed late lies in them.
    """
    passed_over: list[str] = []
    choice = Choice(0, snapshots / "step-00000000")
    for path in reversed(_all(snapshots)):
        try:
            if _trust(path)["state"] not in _TRUST[_TRUST.index(trusted) :]:
                continue
            _verify(path)
        except Damaged as damage:
            passed_over.append(str(damage))
            ledger.warn("snapshot passed over", str(damage), step=_step(path))
            continue
        choice = Choice(_step(path), path)
        break
    else:
        ledger.warn(
            "no certified snapshot",
            "the run goes back to its start: no later state is proven to be free of corruption",
        )
    rejected = _reject_later(snapshots, choice.step, ledger)
    return Choice(choice.step, choice.path, tuple(passed_over), rejected)


def _reject_later(snapshots: Path, step: int, ledger: Ledger) -> tuple[int, ...]:
    reason = f"left behind: the run went back to step {step}"
    rejected = []
    for path in _all(snapshots):
        if _step(path) <= step or _quietly(path, "state") == "rejected":
            continue
        write_json_atomic(
            path / "trust.json",
            {"state": "rejected", "reason": reason, "witness": None, "witness_sha256": None},
        )
        sha256 = sha256_of(path / "manifest.json") if (path / "manifest.json").exists() else ""
        ledger.append(
            SnapshotEvent(
                step=_step(path),
                state="rejected",
                path=f"snapshots/{path.name}",
                sha256=sha256,
                reason=reason,
            )
        )
        rejected.append(_step(path))
    return tuple(rejected)


def _all(snapshots: Path) -> list[Path]:
    return sorted(path for path in snapshots.glob("step-*") if path.is_dir())


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _trust(path: Path) -> dict[str, Any]:
    value = _json(path / "trust.json")
    if "state" not in value:
        raise Damaged(f"{path.name}: trust.json names no state")
    return value


def _verify(path: Path) -> None:
    """Every file the manifest names is there with its hash, and so is the witness that certification left."""
    manifest = _json(path / "manifest.json")
    expected = {path / name: str(entry.get("sha256")) for name, entry in manifest.items()}
    if not expected:
        raise Damaged(f"{path.name}: its manifest names no files")
    trust = _trust(path)
    if trust.get("witness"):
        expected[path.parent / trust["witness"]] = str(trust.get("witness_sha256"))
    for file, wanted in expected.items():
        found = _reading(file, sha256_of)
        if found != wanted:
            raise Damaged(
                f"{path.name}: {file.name} has hash {found[:12]}, recorded was {wanted[:12]}"
            )
    holds = _json(path / "state.json").get("step")
    if holds != _step(path):
        raise Damaged(f"{path.name} is stale: its files are whole and hold step {holds}")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_reading(path, lambda file: file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise Damaged(f"{path.parent.name}: {path.name} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path.parent.name}: {path.name} is not a JSON object")
    return value


def _reading(path: Path, read: Callable[[Path], str]) -> str:
    try:
        return read(path)
    except OSError as error:
        raise Damaged(
            f"{path.parent.name}: {path.name} cannot be read ({error.strerror})"
        ) from None


def _quietly(path: Path, field: str) -> str | None:
    try:
        return str(_trust(path)[field])
    except Damaged:
        return None
