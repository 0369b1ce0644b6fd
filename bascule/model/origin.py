"""What lies at `model.from`: which format, which shape, which bytes. No torch; `model/existing.py` reads the weights."""

from __future__ import annotations

import hashlib
import json
import math
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


def refuse_torn(path: Path) -> None:
    """Does a Hugging Face folder hold as many numbers as its config.json means? Told from the files' headers, before any chip is
    examined; which tensor is amiss is said when they are read. Raises ModelFolderError."""
    if format_of(path) == "gguf":
        return
    config = shape(path)
    sizes: dict[str, int] = {}
    for file in weight_files(path):
        if not file.is_file():
            raise ModelFolderError(
                f"'{path}' names the weight file '{file.name}' and lacks it. Copy the folder again."
            )
        with safe_open(file, framework="np") as opened:
            sizes |= {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    held = sum(size for name, size in sizes.items() if not _counted_elsewhere(name, config))
    meant = count.parameters(config, mtp=True)
    if held != meant:
        raise ModelFolderError(
            f"'{path}' holds {held:,} parameters and its config.json means {meant:,}: layers are missing or left over, or their sizes are others. "
            "Copy or export the folder again."
        )


def _counted_elsewhere(name: str, config: ModelConfig) -> bool:
    """A router's bias is no parameter; a tied head, and what a prediction layer repeats of the trunk, are counted once."""
    repeated = name.startswith("model.layers.") and name.endswith(("embed_tokens.weight", "shared_head.head.weight"))  # fmt: skip
    tied = name == "lm_head.weight" and config.tie_word_embeddings
    return repeated or tied or name.endswith("e_score_correction_bias")


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards its index names, there or not. Raises ModelFolderError where there is neither."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ModelFolderError(
            f"'{folder}' was to be read as a model; it has neither model.safetensors nor model.safetensors.index.json. "
            "Other weight formats are not read: convert with transformers' save_pretrained."
        )
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"'{index}' is damaged ({error!r}). Copy the folder again."
        ) from None
    return [folder / name for name in sorted(set(names))]


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
