"""Documents out of the user's files: plain text, JSON lines, Parquet, what `datasets` saved to disk; and byte-level BPE trained on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from bascule.data import chat
from bascule.data.text_tokenizer import TextTokenizer
from bascule.data.tokenizer import CONTROL, OWN_SETTINGS, TAGS
from bascule.errors import UsageError

PLAIN = (".txt", ".md", ".rst", ".py", ".html", ".tex", ".text")
LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")
OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside its tables; no text


def files(paths: Sequence[Path], unknown: Callable[[Path], None]) -> list[Path]:
    """The files named, and of every folder named the files below it whose kind is known, sorted; `unknown` is told of the others
    that are not hidden. Raises UsageError for none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            for one in sorted(one for one in path.rglob("*") if one.is_file()):
                if one.suffix.lower() in (*PLAIN, *LINES, *TABLES):
                    found.append(one)
                elif one.name not in OF_DATASETS and not _hidden(one.relative_to(path)):
                    unknown(one)
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"'{path}' does not exist. Give files or folders with text.")
    if not found:
        raise UsageError(
            f"No text was found in {', '.join(map(str, paths))}; known kinds: {', '.join((*PLAIN, *LINES, *TABLES))}."
        )
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read(
    paths: Iterable[Path], field: str, unreadable: Callable[[Path, str], None]
) -> Iterator[str]:
    """Every document in order, blank ones too. A plain file is one document; `field` is the text's name in the other kinds.

    A plain file that is not UTF-8 is left out and `unreadable` is told. Raises UsageError for a damaged line or table.
    """
    for path in paths:
        if path.suffix.lower() in LINES:
            yield from _lines(path, field)
        elif path.suffix.lower() in TABLES:
            yield from _table(path, field)
        else:
            yield from _plain(path, unreadable)


def _plain(path: Path, unreadable: Callable[[Path, str], None]) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        unreadable(path, f"is not UTF-8: {error.reason} at byte {error.start}")


def _lines(path: Path, field: str) -> Iterator[str]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8-sig"))[field]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"'{path}', line {number} was to be a JSON object with the text in '{field}' ({error!r}). Mend the line, or "
                    "name the field with --text-field."
                ) from None
            if not isinstance(text, str):
                raise UsageError(
                    f"'{path}', line {number}: '{field}' is a {type(text).__name__}, not text."
                )
            if chat.HALF_A_CHARACTER.search(text):
                raise UsageError(
                    f"'{path}', line {number}: '{field}' holds half of a surrogate pair, which is no text. Mend the line."
                )
            yield text


def _table(path: Path, field: str) -> Iterator[str]:
    """A column of Parquet, or of the Arrow streams that `datasets`' save_to_disk writes (read without that package)."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise UsageError(
            f"'{path}' is a table, and pyarrow is not installed. Install it: pip install 'bascule[parquet]'."
        ) from None
    try:
        if path.suffix.lower() == ".arrow":
            stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            schema, batches = stream.schema, iter(stream)
        else:
            file = parquet.ParquetFile(path)
            schema = file.schema_arrow
            batches = file.iter_batches(columns=[field] if field in schema.names else [])
        if field not in schema.names:
            raise UsageError(
                f"'{path}' has no column '{field}'; columns: {', '.join(schema.names)}. Name it with --text-field."
            )
        kind = str(schema.field(field).type)
        if "string" not in kind:
            raise UsageError(
                f"'{path}', column '{field}' holds {kind}, not text. Name the text's column with --text-field."
            )
        for batch in batches:
            yield from (text or "" for text in batch.column(field).to_pylist())
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UsageError(f"'{path}' cannot be read as a table: {error}") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Byte-level BPE with bascule's control tokens and chat template: every text can be written, every digit is a token.

    Digits one by one make numbers learnable (Singh and Strouse 2024, arXiv 2402.14903); `<think>` and `</think>` are one token
    each. May come out smaller than `vocab_size` when the text has no more pairs. Raises UsageError below 256 bytes + controls.
    """
    least = 256 + len(CONTROL) + len(TAGS)
    if vocab_size < least:
        raise UsageError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {least - 256} control tokens need {least}."
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tags = [AddedToken(tag, special=False, normalized=False) for tag in TAGS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*CONTROL, *TAGS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    # Not "special": skip_special_tokens must not swallow the thought's borders.
    backend.add_tokens(tags)
    # Read back, because what the trainer called special stays so in memory: encode_many would spell the tags out, letter by letter.
    return TextTokenizer(Backend.from_str(backend.to_str()), OWN_SETTINGS, source="trained here")


def byte_lengths(tokenizer: TextTokenizer) -> list[int]:
    """Bytes of text that each token stands for; 0 for special tokens. Raises UsageError when it is not byte-level."""
    raw: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    if "ByteLevel" not in json.dumps([raw.get("decoder"), raw.get("pre_tokenizer")]):
        raise UsageError(
            f"The tokenizer '{tokenizer.source}' is not byte-level BPE; bits per byte cannot be counted. Choose one that is."
        )
    added = {one["id"]: one for one in raw["added_tokens"]}
    lengths = []
    for number in range(tokenizer.vocab_size):
        if number in added:
            one = added[number]
            lengths.append(0 if one["special"] else len(one["content"].encode()))
        else:  # in the byte alphabet every byte is one character
            lengths.append(len(tokenizer.backend.id_to_token(number) or ""))
    return lengths
