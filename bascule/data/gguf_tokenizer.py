"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library: byte-level BPE of the families that bascule reads.

A GGUF file names its pre-tokenizer by a word (`tokenizer.ggml.pre`); the patterns behind the words stand in llama.cpp
(`llm_tokenizer_bpe`) and, for the same models, in their Hugging Face folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from bascule.data.text_tokenizer import TextTokenizer
from bascule.errors import UsageError

_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
_CONTROL, _USER_DEFINED = 3, 4


def load(path: Path) -> TextTokenizer:
    """Raises UsageError for a kind of tokenizer that is not rebuilt here; ids would differ silently otherwise."""
    import gguf

    fields = gguf.GGUFReader(path).fields

    def value(key: str) -> Any:
        field = fields.get(f"tokenizer.{key}")
        return None if field is None else field.contents()

    if value("ggml.model") != "gpt2":
        raise UsageError(
            f"'{path}' has a tokenizer of the kind {value('ggml.model')!r}; bascule rebuilds 'gpt2' (byte-level BPE) only. Use the "
            "model's Hugging Face folder."
        )
    tokens, types = value("ggml.tokens"), value("ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in value("ggml.merges")]
    backend = Backend(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=False)
    )
    backend.pre_tokenizer = _pre_tokenizer(str(value("ggml.pre")), path)
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [token for token, of in zip(tokens, types, strict=True) if of == kind]
        backend.add_tokens(
            [AddedToken(token, special=special, normalized=False) for token in found]
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": value("chat_template"),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = value(f"ggml.{key}_token_id")
        if number is not None:
            settings[f"{name}_token"] = tokens[number]
    return TextTokenizer(backend, settings, source=str(path))


def _pre_tokenizer(name: str, path: Path) -> Any:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return gpt2
    if name in ("smollm", "starcoder"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    pattern = {"qwen2": _QWEN2, "llama-bpe": _LLAMA3, "llama3": _LLAMA3}.get(name)
    if pattern is None:
        raise UsageError(
            f"'{path}' splits text by the rule '{name}'; bascule knows gpt-2, llama-bpe, llama3, qwen2, smollm and starcoder. Use the "
            "model's Hugging Face folder."
        )
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])
