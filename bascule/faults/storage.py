"""Storage: files that are not what was written. Not a matter of sessions: a drill calls `damage` on a file it has just seen written."""

from __future__ import annotations

from pathlib import Path

from bascule import draws
from bascule.faults.catalogue import FaultSpec
from bascule.faults.fault import Touched


def damage(spec: FaultSpec, path: Path, *, step: int, seed: int = 0) -> Touched | None:
    """Spoil `path` in place as `spec` says; None when the fault does not fire at this step. The mtime moves, as it would."""
    if step < spec.onset_step or (spec.until_step is not None and step > spec.until_step):
        return None
    key = draws.key(seed, f"fault.{spec.kind}", spec.seed, step)
    if draws.number(key) >= spec.rate:
        return None
    return _DAMAGE[spec.kind](spec, path, key)


def _tear(spec: FaultSpec, path: Path, key: int) -> Touched:
    size = path.stat().st_size
    kept = int(size * spec.size)
    with path.open("r+b") as file:
        file.truncate(kept)
    return Touched(size - kept, (kept,), f"{path.name} cut to {kept} of {size} bytes")


def _flip(spec: FaultSpec, path: Path, key: int) -> Touched:
    content = bytearray(path.read_bytes())
    places = draws.integers(key, len(content), int(spec.size)).tolist()
    for place in set(places):
        content[place] ^= 1 << (place % 8)
    path.write_bytes(content)
    return Touched(len(set(places)), tuple(sorted(set(places))[:8]), f"bits flipped in {path.name}")


def _lose(spec: FaultSpec, path: Path, key: int) -> Touched:
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    return Touched(size, (0,), f"{path.name} holds only zeros")


_DAMAGE = {"torn_write": _tear, "flipped_write": _flip, "lost_write": _lose}
