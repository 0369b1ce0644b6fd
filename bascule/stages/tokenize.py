"""`bascule tokenize`: the user's text into shards that the pretrain phase reads. No torch."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bascule.config.load import load_recipe
from bascule.data import corpus, documents, gguf_tokenizer
from bascule.data.shards import SPLITS, ShardWriter, save_array, write_index
from bascule.data.text_tokenizer import TextTokenizer, open_tokenizer
from bascule.errors import UsageError
from bascule.folder import sha256_of
from bascule.stages.answer import Answer, say

ENCODE_AT_ONCE = 256
"""Documents handed to the tokenizer together: enough for its threads, few enough for any memory."""


@dataclass(frozen=True)
class Source:
    """The documents to read, `traces` after the files', and which of them are held out: those whose hash lies below `limit`."""

    files: list[Path]
    field: str
    traces: list[str]
    limit: int = 0

    def read(self, unreadable: Callable[[Path, str], None]) -> Iterator[str]:
        yield from documents.read(self.files, self.field, unreadable)
        yield from self.traces

    def texts(self, split: str | None = None) -> Iterator[str]:
        """Every distinct document once, in order; blank ones and later copies of an earlier one are left out."""
        seen: set[int] = set()
        for text in self.read(lambda *_: None):
            hashed = _hash(text)
            if hashed in seen or not text.strip():
                continue
            seen.add(hashed)
            if split is None or split == ("heldout" if hashed < self.limit else "train"):
                yield text


def main(arguments: Namespace) -> Answer:
    """Raises UsageError when the output folder already holds shards, when nothing was named, or nothing is left to train on."""
    folder = Path(arguments.out)
    if not arguments.files and arguments.traces is None:
        raise UsageError(
            "bascule tokenize needs something to read: FILES, --traces RECIPE.toml, or both."
        )
    if (folder / "index.json").exists():
        raise UsageError(f"'{folder}' already holds shards. Remove it, or choose another --out.")
    source, counts = _survey(arguments)
    tokenizer = _tokenizer(arguments, source)
    tokenizer.save(folder)
    index = _write(folder, source, tokenizer, arguments.shard_tokens)
    data: dict[str, Any] = {**counts, **{f"{split}_{kind}": _total(index[split], kind) for split in SPLITS for kind in ("documents", "tokens", "bytes")}}  # fmt: skip
    data |= {"out": str(folder), "vocab_size": index["vocab_size"]}
    return Answer(text=_text(data), data=data)


def _survey(arguments: Namespace) -> tuple[Source, dict[str, int]]:
    """Read everything once: which documents are held out, how many are blank or copies, which files cannot be read."""
    unknown: list[Path] = []
    named = [Path(name) for name in arguments.files]
    found = documents.files(named, unknown.append) if named else []
    source = Source(found, arguments.text_field, _traces(arguments.traces))
    unreadable: list[str] = []
    hashes: set[int] = set()
    read = blank = 0
    for text in source.read(lambda path, why: unreadable.append(f"{path} {why}")):
        if text.strip():
            read += 1
            hashes.add(_hash(text))
        else:
            blank += 1
    if len(hashes) < 2:
        raise UsageError(
            f"{len(hashes)} distinct documents were found in {len(found)} files; one to train on and one to hold out are the least. "
            "Split the text into several files, or one JSON line a document."
        )
    for line in [*unreadable, *_other_kinds(unknown)]:
        say(f"left out: {line}")
    # At least one document is held out, however few there are: the one with the smallest hash.
    limit = max(int(arguments.held_out * 2**64), min(hashes) + 1)
    counts = {
        "files": len(found),
        "documents": read,
        "traces": len(source.traces),
        "copies_left_out": read - len(hashes),
        "blank_left_out": blank,
        "unreadable_files": len(unreadable),
        "other_files": len(unknown),
    }
    return replace(source, limit=limit), counts


def _other_kinds(unknown: list[Path]) -> list[str]:
    """What is said of the files below the folders whose kind is not read; nothing where there are none."""
    if not unknown:
        return []
    kinds = ", ".join(sorted({one.suffix or "no ending" for one in unknown}))
    example = f"{unknown[0]}" + (" and others" if len(unknown) > 1 else "")
    return [
        f"{len(unknown)} files of other kinds ({kinds}), for instance {example}; name a file itself to read it as plain text"
    ]


def _traces(recipe: str | None) -> list[str]:
    """The training problems of a recipe with their worked solutions, a document each. No held-out problem is among them."""
    if recipe is None:
        return []
    found = load_recipe(Path(recipe), [])
    problems = corpus.split(found.data, found.seed).train[: found.data.worked_problems]
    worked = corpus.sft_examples(
        problems, found.seed, lambda question: question, verified=found.data.verify_solutions
    )
    if not worked:
        raise UsageError(
            f"--traces {recipe}: none of its {len(problems)} training problems has a worked solution. Name a recipe whose tasks have a "
            "solver: chain_sum, countdown, gcd, letter_counting, or a task of your own with traces."
        )
    return [f"{question}\n{trace}" for question, trace in worked]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _tokenizer(arguments: Namespace, source: Source) -> TextTokenizer:
    if arguments.tokenizer is None:
        say(f"train a byte-level BPE of at most {arguments.vocab_size} tokens")
        return documents.train_tokenizer(source.texts("train"), arguments.vocab_size)
    path = Path(arguments.tokenizer)
    if path.name == "tokenizer.json":
        path = path.parent
    found = gguf_tokenizer.load(path) if path.suffix == ".gguf" else open_tokenizer(path)
    if not isinstance(found, TextTokenizer):
        raise UsageError(
            f"'{path}' is bascule's closed vocabulary for its own tasks, which does not know most of any text. Leave --tokenizer out "
            "to train one, or give a byte-level BPE."
        )
    return found


def _write(
    folder: Path, source: Source, tokenizer: TextTokenizer, shard_tokens: int
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    index: dict[str, Any] = {
        "dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": tokenizer.digest(),
        "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id,
    }  # fmt: skip
    for split in SPLITS:
        writer = ShardWriter(folder, split, dtype, shard_tokens=shard_tokens)
        texts = source.texts(split)
        while some := list(islice(texts, ENCODE_AT_ONCE)):
            for text, ids in zip(some, tokenizer.encode_many(some), strict=True):
                writer.add([tokenizer.bos_id, *ids, tokenizer.eos_id], len(text.encode()))
        writer.close()
        index[split] = writer.shards
    save_array(
        folder / "token_bytes.npy", np.asarray(documents.byte_lengths(tokenizer), dtype=np.uint16)
    )
    index["token_bytes_sha256"] = sha256_of(folder / "token_bytes.npy")
    write_index(folder, index)
    return index


def _total(shards: list[dict[str, int]], kind: str) -> int:
    return sum(one[kind] for one in shards)


def _text(data: dict[str, Any]) -> str:
    traces = f"{data['traces']:,} worked solutions read. " if data["traces"] else ""
    return (
        f"{traces}{data['train_documents']:,} documents to train on, {data['train_tokens']:,} tokens of {data['train_bytes']:,} bytes; "
        f"{data['heldout_documents']:,} held out, {data['heldout_tokens']:,} tokens. {data['copies_left_out']} copies, "
        f"{data['blank_left_out']} blank ones and {data['unreadable_files']} unreadable files left out. Vocabulary {data['vocab_size']:,}.\n"
        f'In a recipe: pretrain.data = "{data["out"]}" and train.phases = ["pretrain", ..]'
    )
