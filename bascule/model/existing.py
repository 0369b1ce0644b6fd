"""Read an existing model into our decoder, in fp32: what `model.from` starts a run with."""

from __future__ import annotations

from pathlib import Path

import torch

from bascule.config.model import ModelConfig
from bascule.model import gguf, origin
from bascule.model.transformer import Transformer
from bascule.model.weights import fill, load_hf


def load(path: Path, *, positions: int | None = None) -> tuple[Transformer, ModelConfig]:
    """(model on the CPU in fp32, its configuration). Quantised GGUF tensors are dequantised: training needs every bit.

    `positions` lowers `max_position_embeddings` (rotary tables and caches shrink; the weights do not depend on it).
    Raises ModelFolderError when the files are torn or mean a computation that our decoder does not do.
    """
    if origin.format_of(path) == "huggingface":
        model, config = load_hf(path)
        state = model.state_dict()
    else:
        file = gguf.File(path)
        config = file.config()
        model = Transformer(config)
        fill(model, {name: torch.from_numpy(values) for name, values in file.tensors(config)}, path)
        state = model.state_dict()
    if positions is not None and positions != config.max_position_embeddings:
        config = config.model_copy(update={"max_position_embeddings": positions})
        model = Transformer(config)
        model.load_state_dict(state)
    return model.float(), config
