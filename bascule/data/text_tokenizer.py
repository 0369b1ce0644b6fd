"""Any tokenizer in the `tokenizers` format behind the words of our own: what existing models and models of free text use.

Prompts are written in the model's own chat template where its folder has one. `<think>` need not be a token of the vocabulary:
as plain text it costs a few tokens more and means the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from bascule.config.model import ModelConfig
from bascule.data import chat
from bascule.data.tokenizer import TAGS, Speller, Tokenizer
from bascule.errors import UsageError
from bascule.folder import write_atomic, write_json_atomic

NO_TOKEN = -1
"""The id of a mark that the vocabulary does not have; equal to no token."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""For base models, which have no chat template: words that any text model has seen."""


REPLACEMENT = "\ufffd"
LONGEST = (
    4  # bytes of a character in UTF-8, and so the tokens that one character may be parted into
)


def _byte_signs() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on (openai/gpt-2, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + at): byte for at, byte in enumerate(others)
    }


_BYTES = _byte_signs()


class TextSpeller(Speller):
    """A character may be parted over several tokens: they are held back until it is whole. What never becomes one is shown as U+FFFD.

    Tokens are decoded together with those shown last, because some vocabularies drop a space in front of the first token of a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._shown: list[int] = []
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        self._held.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT) and len(self._held) < LONGEST:
            return ""
        return self._release(text)

    def close(self) -> str:
        return self._release(self._text()) if self._held else ""

    def _text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode([*self._shown, *self._held])[len(before) :]

    def _release(self, text: str) -> str:
        self._shown, self._held = self._held, []
        return text


class TextTokenizer(Tokenizer):
    """`settings` is the content of tokenizer_config.json: the names of the special tokens and the chat template."""

    def __init__(self, backend: Backend, settings: Mapping[str, Any], *, source: str) -> None:
        self.backend = backend
        self.settings = dict(settings)
        self.source = source
        self._eos = self._named("eos_token")
        if self._eos is None:
            raise UsageError(
                f"The tokenizer '{source}' names no eos_token that is in its vocabulary; without one no text ever ends. "
                "Add eos_token to its tokenizer_config.json."
            )
        self._bos = self._named("bos_token")
        self._pad = self._named("pad_token")
        self._silent_ids = {self.pad_id, self.bos_id, self.eos_id}

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model may have more rows than that."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @property
    def pad_id(self) -> int:
        return self.eos_id if self._pad is None else self._pad

    @property
    def bos_id(self) -> int:
        return self.eos_id if self._bos is None else self._bos

    @property
    def eos_id(self) -> int:
        assert self._eos is not None
        return self._eos

    @property
    def unk_id(self) -> int:
        found = self._named("unk_token")
        return NO_TOKEN if found is None else found

    @property
    def think_open_id(self) -> int:
        return self._id(chat.THINK_OPEN)

    @property
    def think_close_id(self) -> int:
        return self._id(chat.THINK_CLOSE)

    @cached_property
    def _every_symbol(self) -> tuple[str, ...]:
        return tuple(
            self.backend.decode([i], skip_special_tokens=False) for i in range(self.vocab_size)
        )

    @property
    def symbols(self) -> tuple[str, ...]:  # type: ignore[override]
        """The text of every token. A token that is part of a character shows as U+FFFD."""
        return self._every_symbol

    @cached_property
    def _control_symbols(self) -> tuple[str, ...]:
        added = self.backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @property
    def controls(self) -> tuple[str, ...]:
        return self._control_symbols

    @cached_property
    def control_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(
            at for at, token in added.items() if token.special or token.content in TAGS
        )

    def speller(self) -> Speller:
        return TextSpeller(self)

    def bytes_of(self, token: int) -> bytes:
        name = self.backend.id_to_token(token)
        if not self._byte_level or name is None or token in self.backend.get_added_tokens_decoder():
            return self.symbols[token].encode()
        return bytes(_BYTES[sign] for sign in name)

    @cached_property
    def _byte_level(self) -> bool:
        return isinstance(self.backend.decoder, decoders.ByteLevel)

    def encode(self, text: str, *, replace_unknown: bool = False) -> list[int]:
        del replace_unknown  # byte-level vocabularies know every text
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts to learn from. Control tokens spelled out in them are read as plain text, so that no document can end
        itself or speak as the user."""
        self.backend.encode_special_tokens = True
        try:
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = False
        return [one.ids for one in found]

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self._silent_ids]
        text: str = self.backend.decode(kept, skip_special_tokens=False)
        return text

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self.template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self._name("bos_token") or "",
                eos_token=self._name("eos_token") or "",
            )
        except TemplateError as error:
            raise UsageError(
                f"The chat template of '{self.source}' cannot write these messages: {error}."
            ) from None

    def save(self, folder: Path) -> None:
        write_atomic(folder / "tokenizer.json", lambda path: self.backend.save(str(path)))
        write_json_atomic(folder / "tokenizer_config.json", self.settings)

    def digest(self) -> str:
        """SHA-256 of the vocabulary and rules in the library's own spelling: equal for equal tokenizers, however their files look."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @property
    def template(self) -> str:
        found = self.settings.get("chat_template")
        if isinstance(found, list):  # several named templates; the one for plain chat is called so
            found = next((one["template"] for one in found if one.get("name") == "default"), None)
        return found or PLAIN_TEMPLATE

    def _name(self, kind: str) -> str | None:
        found = self.settings.get(kind)
        return found.get("content") if isinstance(found, dict) else found

    def _named(self, kind: str) -> int | None:
        name = self._name(kind)
        found: int | None = None if name is None else self.backend.token_to_id(name)
        return found

    def _id(self, text: str) -> int:
        found = self.backend.token_to_id(text)
        return NO_TOKEN if found is None else int(found)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: our closed vocabulary, or any other in the `tokenizers` format.

    Raises UsageError when there is none, or one that is only there as a SentencePiece or vocabulary file.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            f"'{folder}' has no tokenizer.json. Give a model folder with one; transformers' "
            "AutoTokenizer.from_pretrained(..).save_pretrained(..) writes it from older files."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        closed = raw["model"]["type"] == "WordLevel"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UsageError(
            f"'{path}' is damaged or not a tokenizers file ({error!r}). Copy it again."
        ) from None
    if closed:
        return Tokenizer.load(Path(folder))
    return TextTokenizer(Backend.from_file(str(path)), _settings(Path(folder)), source=str(folder))


def open_or_own(folder: Path) -> Tokenizer:
    """The tokenizer saved in `folder`, or bascule's own where nothing is saved."""
    return open_tokenizer(folder) if (folder / "tokenizer.json").is_file() else Tokenizer()


def sized(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """`config` with as many rows in its embedding as the tokenizer has ids; an existing model keeps the rows it has."""
    if config.from_:
        return config
    return config.model_copy(update={"vocab_size": tokenizer.vocab_size})


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    template = folder / "chat_template.jinja"  # where transformers 5 puts it
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return dict(settings)


def _refuse(message: str) -> str:
    raise TemplateError(message)
