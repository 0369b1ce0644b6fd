"""The tokenizer inside a GGUF file, read into the `tokenizers` library and written from it: byte-level BPE of the families that bascule
reads, and bascule's own closed vocabulary as a BPE that never merges.

A GGUF file names its pre-tokenizer by a word (`tokenizer.ggml.pre`); the patterns behind the words stand in llama.cpp
(`llm_tokenizer_bpe`) and, for the same models, in their Hugging Face folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from bascule.data.text_tokenizer import TextTokenizer
from bascule.data.tokenizer import CONTROL, TAGS, Tokenizer
from bascule.errors import UsageError

_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
_PATTERNS = {"qwen2": _QWEN2, "llama-bpe": _LLAMA3, "llama3": _LLAMA3}
_WORDS = ("gpt-2", "smollm", "qwen2", "llama-bpe")
"""Rules that are written; `load` knows synonyms of them too."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_BYTE_SPELLING = {
    " ": "Ġ",
    "\n": "Ċ",
}  # byte-level BPE's signs for the two bytes of our vocabulary that are no sign of their own
_NO_MERGE = (
    "Ā ā"  # llama.cpp demands a list of merges; bytes 0 and 1 never stand side by side in text
)


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
    merges = [tuple(merge.split(" ", 1)) for merge in value("ggml.merges") if merge != _NO_MERGE]
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
    pattern = _PATTERNS.get(name)
    if pattern is None:
        raise UsageError(
            f"'{path}' splits text by the rule '{name}'; bascule knows gpt-2, llama-bpe, llama3, qwen2, smollm and starcoder. Use the "
            "model's Hugging Face folder."
        )
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


def add(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Put `tokenizer` into a gguf.GGUFWriter; `rows` of the embedding beyond its ids are filled with unused tokens.

    Raises UsageError for a tokenizer whose splitting rule llama.cpp does not have: its ids would differ silently.
    """
    if isinstance(tokenizer, TextTokenizer):
        rule, merges = _rule(tokenizer), _merges(tokenizer)
        tokens, types = _text_vocabulary(tokenizer)
    else:
        rule, merges = "gpt-2", [_NO_MERGE]
        tokens, types = _closed_vocabulary(tokenizer)
    missing = rows - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + at}]" for at in range(missing))])
    writer.add_token_types([*types, *[_UNUSED] * missing])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)  # chat templates write it
    writer.add_chat_template(tokenizer.template)


def _closed_vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    kinds = {**dict.fromkeys(CONTROL, _CONTROL), **dict.fromkeys(TAGS, _USER_DEFINED)}
    return (
        [_BYTE_SPELLING.get(symbol, symbol) for symbol in tokenizer.symbols],
        [kinds.get(symbol, _NORMAL) for symbol in tokenizer.symbols],
    )


def _text_vocabulary(tokenizer: TextTokenizer) -> tuple[list[str], list[int]]:
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens, types = [], []
    for at in range(tokenizer.vocab_size):
        token = tokenizer.backend.id_to_token(at)
        kind = _NORMAL if token is not None else _UNUSED
        if at in added:
            kind = _CONTROL if added[at].special else _USER_DEFINED
        tokens.append(f"[PAD{at}]" if token is None else token)
        types.append(kind)
    return tokens, types


def _merges(tokenizer: TextTokenizer) -> list[str]:
    model = json.loads(tokenizer.backend.to_str())["model"]
    if model["type"] != "BPE":
        raise UsageError(
            f"'{tokenizer.source}' has a tokenizer of the kind {model['type']}; GGUF files are written for byte-level BPE. Use the "
            "Hugging Face folder."
        )
    return [one if isinstance(one, str) else " ".join(one) for one in model["merges"]] or [
        _NO_MERGE
    ]


def _rule(tokenizer: TextTokenizer) -> str:
    """llama.cpp's word for how this tokenizer splits text before it merges."""
    asked = _splitting(tokenizer.backend.pre_tokenizer)
    path = Path(tokenizer.source)
    for word in _WORDS:
        if _splitting(_pre_tokenizer(word, path)) == asked:
            return word
    raise UsageError(
        f"'{tokenizer.source}' splits text by a rule that has no name in llama.cpp among {', '.join(_WORDS)}. Use the Hugging Face folder."
    )


def _splitting(pre_tokenizer: Any) -> Any:
    """What decides where text is cut; offsets that only matter to highlighting are left out."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    rule = json.loads(backend.to_str())["pre_tokenizer"]
    parts = rule["pretokenizers"] if rule and rule["type"] == "Sequence" else [rule]
    return [
        {key: value for key, value in (part or {}).items() if key != "trim_offsets"}
        for part in parts
    ]
