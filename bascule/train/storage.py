"""Tensors and JSON on disk, flushed before they are named, read back with errors a person can act on. No pickle."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bascule.errors import SnapshotError
from bascule.tensors import save_tensors
from bascule.train.state import StateDict

_ASIDE = ".old-"


def write_tensors(path: Path, state: StateDict) -> dict[str, Any]:
    """Write the tensors of `state` to `path`, flushed; return the rest, which must be JSON. Raises OSError."""
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    save_tensors(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SnapshotError(
            f"'{path}' cannot be read as safetensors ({error}). Use an older snapshot."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SnapshotError(
            f"The snapshot '{path.parent}' is damaged: {path.name} cannot be read ({error}). Use an older snapshot."
        ) from None
    if not isinstance(value, dict):
        raise SnapshotError(
            f"The snapshot '{path.parent}' is damaged: {path.name} is not a JSON object. Use an older snapshot."
        )
    return value


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename onto `final`. A folder cannot be renamed onto a full one, so an old one steps aside first."""
    aside = final.parent / f".{final.name}{_ASIDE}{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    shutil.rmtree(aside, ignore_errors=True)
    sync_folder(final.parent)


def recover_folders(parent: Path, *, sole_writer: bool = False) -> None:
    """Give back its name to each folder that stepped aside for one that never came, because its writer was killed in between.

    `sole_writer`: nobody else writes into `parent` now, so a live process of the same id is another one that got the id later.
    """
    for aside in sorted(parent.glob(f".*{_ASIDE}*")):
        name, _, writer = aside.name.removeprefix(".").rpartition(_ASIDE)
        if not (parent / name).exists() and (sole_writer or not _is_at_work(writer)):
            with contextlib.suppress(OSError):  # another reader did it first, or may not write here
                aside.rename(parent / name)


def _is_at_work(pid: str) -> bool:
    """Whether the process may be between the two renames of `replace_folder`. This one is not: it is asking."""
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, of another owner
    return True
