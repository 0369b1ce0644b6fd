"""The closed vocabulary: special tokens, newline and printable ASCII, one id per character.

Kept as a `tokenizers` file so that `transformers.AutoTokenizer` loads the folder and gives the same ids. `encode` and `decode`
here are plain table look-ups over the same vocabulary (a test holds the two against each other); about 4 times faster than
the library for short texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from bascule.data import chat
from bascule.errors import UsageError
from bascule.folder import write_atomic, write_json_atomic

PAD, UNK = "<pad>", "<unk>"
CONTROL: Final = (PAD, chat.BOS, chat.EOS, UNK, chat.SYSTEM, chat.USER, chat.ASSISTANT)
TAGS: Final = (chat.THINK_OPEN, chat.THINK_CLOSE)
CHARACTERS: Final = ("\n", *(chr(code) for code in range(32, 127)))
"""Every character that can be encoded. Ids: CONTROL, then TAGS, then these, in order; the order is part of saved models."""

OWN_SETTINGS: Final[dict[str, object]] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "bos_token": chat.BOS,
    "eos_token": chat.EOS,
    "unk_token": UNK,
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "chat_template": chat.TEMPLATE,
}
"""The content of tokenizer_config.json for every vocabulary with our control tokens."""

_SILENT: Final = frozenset({PAD, chat.BOS, chat.EOS})


class Speller:
    """Spells one text token by token: `feed` each, `close` at the end; the pieces joined are the text. Nothing is ever held back here:
    in a closed vocabulary every token is a whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def feed(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def close(self) -> str:
        return ""


class Tokenizer:
    """Text to ids and back. `Tokenizer()` is bascule's own vocabulary; `Tokenizer.load(folder)` reads one that was saved."""

    def __init__(self, symbols: tuple[str, ...] = (*CONTROL, *TAGS, *CHARACTERS)) -> None:
        self.symbols = symbols
        self._id_of = {symbol: i for i, symbol in enumerate(symbols)}
        self._text_of = ["" if symbol in _SILENT else symbol for symbol in symbols]
        longer = sorted((symbol for symbol in symbols if len(symbol) > 1), key=len, reverse=True)
        self._pieces = re.compile("|".join([*map(re.escape, longer), "."]), re.DOTALL)

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    @property
    def pad_id(self) -> int:
        return self._id_of[PAD]

    @property
    def bos_id(self) -> int:
        return self._id_of[chat.BOS]

    @property
    def eos_id(self) -> int:
        return self._id_of[chat.EOS]

    @property
    def unk_id(self) -> int:
        return self._id_of[UNK]

    @property
    def think_open_id(self) -> int:
        return self._id_of[chat.THINK_OPEN]

    @property
    def think_close_id(self) -> int:
        return self._id_of[chat.THINK_CLOSE]

    @property
    def controls(self) -> tuple[str, ...]:
        """How control tokens are spelled: text from outside that holds one would be read as that token."""
        return tuple(symbol for symbol in self.symbols if len(symbol) > 1 and symbol not in TAGS)

    def encode(self, text: str, *, replace_unknown: bool = False) -> list[int]:
        """Ids of `text`; nothing is added at either end. Special tokens written out (`<think>`) become their one id.

        A character outside the vocabulary raises UsageError, or becomes `<unk>` when `replace_unknown` is set.
        """
        id_of = self._id_of
        pieces = self._pieces.findall(text)
        try:
            return [id_of[piece] for piece in pieces]
        except KeyError:
            if replace_unknown:
                return [id_of.get(piece, self.unk_id) for piece in pieces]
            unknown = sorted({piece for piece in pieces if piece not in id_of})
            raise UsageError(
                f"The text holds {', '.join(map(repr, unknown[:5]))}, which this model's vocabulary of {self.vocab_size} "
                "symbols does not know; allowed are newline and printable ASCII. Replace the characters."
            ) from None

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`. `<pad>`, `<bos>` and `<eos>` are silent; every other special token is written out."""
        text_of = self._text_of
        return "".join([text_of[i] for i in ids])

    def speller(self) -> Speller:
        """Text of tokens as they come, one at a time."""
        return Speller(self)

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for in UTF-8; part of a character where vocabularies know such tokens."""
        return self.symbols[token].encode()

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no plain text is made of: controls, and the thought's tags."""
        return frozenset(at for at, symbol in enumerate(self.symbols) if len(symbol) > 1)

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Messages as the text that a model with this vocabulary reads."""
        return chat.render(messages, add_generation_prompt=add_generation_prompt)

    @property
    def template(self) -> str:
        """The chat format as a Jinja template: `render` for readers that are not us."""
        return chat.TEMPLATE

    def prompt(self, question: str) -> str:
        """The text that asks one question and waits for the answer."""
        return self.render([{"role": "user", "content": question}])

    @cached_property
    def opens_thought(self) -> bool:
        """Whether prompts end with an open `<think>` (R1's template does): completions then begin inside the thought."""
        return self.prompt("?").rstrip().endswith(chat.THINK_OPEN)

    def completion(self, ids: list[int]) -> str:
        """A completion as verifiers read it: with the thought's opening tag even where the prompt brought it."""
        return (chat.THINK_OPEN if self.opens_thought else "") + self.decode(ids)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template) into `folder`."""
        write_atomic(folder / "tokenizer.json", lambda path: self._backend().save(str(path)))
        write_json_atomic(folder / "tokenizer_config.json", OWN_SETTINGS)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a folder written by `save`. Raises UsageError when it is missing or is not such a vocabulary."""
        path = Path(folder) / "tokenizer.json"
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            vocabulary: dict[str, int] = model["vocab"]
        except FileNotFoundError:
            raise UsageError(
                f"'{folder}' has no tokenizer.json. Give a model folder, for instance out/NAME/model."
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(
                f"'{path}' is damaged or not a tokenizers file ({error!r}). Export the model again."
            ) from None
        symbols = tuple(sorted(vocabulary, key=lambda symbol: vocabulary[symbol]))
        missing = [symbol for symbol in (*CONTROL, *TAGS) if symbol not in vocabulary]
        if (
            model.get("type") != "WordLevel"
            or missing
            or [*vocabulary.values()] != [*range(len(symbols))]
        ):
            raise UsageError(
                f"'{path}' is a {model.get('type')} tokenizer without {', '.join(missing) or 'consecutive ids'}; bascule reads "
                "the closed vocabularies it saved itself. Use transformers.AutoTokenizer for others."
            )
        return cls(symbols)

    def _backend(self) -> Backend:
        backend = Backend(models.WordLevel(dict(self._id_of), unk_token=UNK))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(
            [AddedToken(symbol, special=True, normalized=False) for symbol in CONTROL]
        )
        # As in DeepSeek-R1's own file the tags are not "special": skip_special_tokens must not swallow the thought's borders.
        backend.add_tokens([AddedToken(symbol, special=False, normalized=False) for symbol in TAGS])
        return backend
