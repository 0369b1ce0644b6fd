"""The one back edge of a run: weights of the last committed step on their way from the trainer to the rollout engine.

A version is one safetensors file in the run's `weights/` folder. Its name carries the version, its header too, and its SHA-256
travels beside the path, so that an engine computes with exactly the weights it was told to use, or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load as load_bytes
from torch import Tensor

from bascule.errors import SnapshotError
from bascule.folder import sha256_of, write_atomic
from bascule.tensors import save_tensors

KEEP = 2  # the newest, and the one before it, which an engine may be reading this moment


def publish(folder: Path, state: Mapping[str, Tensor], version: int) -> tuple[Path, str]:
    """Write `state` as `version`, remove versions older than the one before; return path and SHA-256.

    Tensors that share memory (tied embeddings) are written once and listed as aliases: safetensors refuses twins.
    """
    path = folder / f"weights-{version:08d}.safetensors"
    tensors, aliases = _untwin(state)
    # One entry only: safetensors writes several in an order that differs from process to process, and so would the hash.
    header = {"bascule": json.dumps({"version": version, "aliases": aliases}, sort_keys=True)}
    write_atomic(path, lambda temporary: save_tensors(tensors, temporary, header))
    for old in sorted(folder.glob("weights-*.safetensors"))[:-KEEP]:
        if old != path:
            old.unlink(missing_ok=True)
    return path, sha256_of(path)


def load(path: Path, sha256: str, version: int) -> dict[str, Tensor]:
    """Read a published version onto the CPU. Raises SnapshotError when anything differs from what was announced.

    The bytes that are hashed are the bytes that are parsed; a file swapped in between cannot slip in.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SnapshotError(
            f"The weights of version {version}, '{path}', do not exist. Publish them again."
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SnapshotError(
            f"The weights of version {version}, '{path}', have SHA-256 {found[:12]}…, announced was {sha256[:12]}…. "
            "They were not loaded; publish them again."
        )
    held, aliases = _header(data)
    if held != version:
        raise SnapshotError(
            f"'{path}' says that it holds version {held}, asked was version {version}. "
            "It was not loaded; publish the weights again."
        )
    state: dict[str, Tensor] = load_bytes(data)
    return state | {name: state[original] for name, original in aliases.items()}


def _untwin(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split into tensors to write and {name: name it shares memory with}."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = tensor.detach().to("cpu").contiguous()
    return tensors, aliases


def _header(data: bytes) -> tuple[int, dict[str, str]]:
    """Version and aliases. A safetensors file begins with eight bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    found = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["bascule"])
    return int(found["version"]), dict(found["aliases"])
