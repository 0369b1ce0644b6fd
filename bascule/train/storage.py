"""Tensors and JSON on disk, flushed before they are named, read back with errors a person can act on. No pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bascule.errors import SnapshotError
from bascule.train.state import StateDict


def write_tensors(path: Path, state: StateDict) -> dict[str, Any]:
    """Write the tensors of `state` to `path`, flushed; return the rest, which must be JSON."""
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, path)
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
    aside = final.parent / f".{final.name}.old-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    shutil.rmtree(aside, ignore_errors=True)
    sync_folder(final.parent)
