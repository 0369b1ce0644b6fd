"""What lies at `model.from`: which format, which shape, which bytes. No torch; `model/existing.py` reads the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from bascule.config.model import ModelConfig
from bascule.errors import ModelFolderError
from bascule.model import count, gguf, hf_config
from bascule.records import ModelOrigin


def format_of(path: Path) -> Literal["huggingface", "gguf"]:
    """Raises ModelFolderError when nothing, or nothing readable, lies there."""
    if path.is_dir():
        return "huggingface"
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    raise ModelFolderError(
        f"model.from = '{path}' is neither a folder nor a .gguf file. Give a Hugging Face folder with config.json and "
        "safetensors, or a GGUF file; models are not downloaded."
    )


def shape(path: Path) -> ModelConfig:
    """The architecture of the model found there."""
    if format_of(path) == "gguf":
        return gguf.File(path).config()
    raw = hf_config.read_hf(path)
    layers = sum(name.endswith(".eh_proj.weight") for name in _tensor_names(path))
    return hf_config.from_hf(raw, source=str(path), mtp_layers=layers)


def describe(path: Path) -> ModelOrigin:
    """The ledger's record: what was found, and the SHA-256 of the bytes that make the model."""
    config, files = shape(path), _files(path)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return ModelOrigin(
        path=str(path), format=format_of(path), family=hf_config.family(config), parameters=count.parameters(config),
        files=tuple(file.name for file in files), sha256=digest.hexdigest(),
    )  # fmt: skip


def _files(path: Path) -> list[Path]:
    if format_of(path) == "gguf":
        return [path]
    return [path / "config.json", *sorted(path.glob("*.safetensors"))]


def _tensor_names(folder: Path) -> list[str]:
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as opened:
                names += list(opened.keys())
        except SafetensorError as error:
            raise ModelFolderError(
                f"The weight file '{file}' is torn or is no safetensors file ({error}). Copy it again."
            ) from None
    return names
