"""GGUF files of the llama family: their shape, and their tensors under Hugging Face's names, dequantised to fp32. No torch.

The format and the arithmetic of its quantised blocks are the `gguf` package's (extra `gguf`), which only needs numpy. llama.cpp
stores the rows of `q_proj` and `k_proj` of "llama" files in another order, because it turns neighbouring pairs where Hugging
Face turns halves; the order is put back here (convert_hf_to_gguf.py, `LlamaModel.permute`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from bascule.config.model import ModelConfig
from bascule.errors import ModelFolderError

ARCHITECTURES = ("llama", "qwen2", "qwen3")

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DERIVED = (
    "rope_freqs.weight"  # frequencies scaled for long contexts: another computation than ours
)


class File:
    """One opened GGUF file. Opening costs seconds for a large vocabulary: the package walks every string of it."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ModuleNotFoundError:
            raise ModelFolderError(
                f"'{path}' is a GGUF file, and the package gguf is not installed. Install it: pip install 'bascule[gguf]'."
            ) from None
        self.path = path
        self._dequantize = gguf.quants.dequantize
        try:
            self._reader: Any = gguf.GGUFReader(path)
        except FileNotFoundError:
            raise ModelFolderError(
                f"'{path}' does not exist. Give the path of a GGUF file."
            ) from None
        except (ValueError, IndexError, KeyError) as error:
            raise ModelFolderError(
                f"'{path}' is torn or is no GGUF file ({error}). Copy it again and compare the sizes."
            ) from None

    def value(self, key: str) -> Any:
        """A metadata value (number, text, list), or None when the file lacks the key."""
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def config(self) -> ModelConfig:
        """Raises ModelFolderError for an architecture, or a variant of one, that bascule's decoder does not compute."""
        kind = self._architecture()
        names = {tensor.name: tensor for tensor in self._reader.tensors}
        scaling = self.value(f"{kind}.rope.scaling.type") or "none"
        if _DERIVED in names or scaling != "none":
            raise ModelFolderError(
                f"'{self.path}' scales its rotary frequencies ({scaling}); bascule computes plain ones only. Choose another model."
            )
        hidden, heads = self._number("embedding_length"), self._number("attention.head_count")
        try:
            return ModelConfig(
                preset="custom", attention="gqa", ffn="swiglu", qk_norm=kind == "qwen3",
                attention_bias=kind == "qwen2", attention_output_bias=kind != "qwen2",
                vocab_size=int(names["token_embd.weight"].shape[1]), hidden_size=hidden,
                num_hidden_layers=self._number("block_count"), num_attention_heads=heads,
                num_key_value_heads=self._number("attention.head_count_kv", heads),
                head_dim=self._number("attention.key_length", hidden // max(1, heads)),
                intermediate_size=self._number("feed_forward_length"),
                max_position_embeddings=self._number("context_length"),
                rope_theta=float(self.value(f"{kind}.rope.freq_base") or 10000.0),
                # Stored as fp32: 1e-5 comes back as 9.99999975e-06, which would not be the number the model was trained with.
                rms_norm_eps=float(f"{self.value(f'{kind}.attention.layer_norm_rms_epsilon'):.6g}"),
                tie_word_embeddings="output.weight" not in names,
            )  # fmt: skip
        except (ValidationError, KeyError, TypeError) as error:
            raise ModelFolderError(
                f"'{self.path}' describes a {kind} model that bascule's decoder cannot be: {error}."
            ) from None

    def tensors(self, config: ModelConfig) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(Hugging Face's name, fp32 values in its layout) of every tensor; one at a time, so that the peak stays low."""
        turned = self._architecture() == "llama"
        for tensor in self._reader.tensors:
            name = _hf_name(tensor.name)
            if name is None:
                raise ModelFolderError(
                    f"'{self.path}' holds the tensor '{tensor.name}', which no model of ours has. Choose another model."
                )
            values = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if turned and name.endswith("q_proj.weight"):
                values = _unturn(values, config.num_attention_heads)
            elif turned and name.endswith("k_proj.weight"):
                values = _unturn(values, config.num_key_value_heads)
            yield (
                name,
                np.array(values, order="C"),
            )  # a copy: unquantised ones are views of the file

    def _architecture(self) -> str:
        kind = self.value("general.architecture")
        if kind not in ARCHITECTURES:
            raise ModelFolderError(
                f"'{self.path}' has the architecture {kind!r}; bascule reads GGUF files of {', '.join(ARCHITECTURES)}. "
                "Convert the model to safetensors with transformers, or choose one of these."
            )
        return str(kind)

    def _number(self, key: str, absent: int | None = None) -> int:
        found = self.value(f"{self._architecture()}.{key}")
        found = absent if found is None else found
        if found is None:
            raise ModelFolderError(
                f"'{self.path}' lacks the key '{key}'. Copy or convert the file again."
            )
        return int(found)


def _hf_name(name: str) -> str | None:
    if name in TOP:
        return TOP[name]
    match name.split("."):
        case ["blk", number, part, kind] if part in BLOCK:
            return f"model.layers.{number}.{BLOCK[part]}.{kind}"
    return None


def _unturn(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from neighbouring pairs (x0,y0,x1,y1..) back to halves (x0,x1..,y0,y1..)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
