"""Tokenised text on disk: packed, checksummed, read by windows in an order that is a pure function of seed, epoch and step.

    DIR/index.json                   what is there: sizes, SHA-256 of every file, the tokenizer's digest
    DIR/tokenizer.json ..            the tokenizer, so that the folder is complete
    DIR/token_bytes.npy              bytes of text that each token stands for (0: special), for bits per byte
    DIR/train-00000.npy              token ids, one document after another, uint16 or uint32
    DIR/train-00000.documents.npy    where each document ends (uint64, counted within the shard)
    DIR/heldout-00000.npy ..         documents chosen by the hash of their text; never trained on

A document is `<bos> text <eos>`. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bascule import draws
from bascule.errors import UsageError
from bascule.folder import sha256_of, write_atomic, write_json_atomic

FORMAT = 1
SPLITS = ("train", "heldout")


class ShardWriter:
    """Collects the documents of one split and writes a shard whenever `shard_tokens` are full; `close` writes the rest."""

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype[Any], *, shard_tokens: int
    ) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self._parts: list[NDArray[Any]] = []
        self._ends: list[int] = []
        self._held = self._bytes = 0

    def add(self, ids: Sequence[int], text_bytes: int) -> None:
        self._parts.append(np.asarray(ids, dtype=self.dtype))
        self._held += len(ids)
        self._bytes += text_bytes
        self._ends.append(self._held)
        if self._held >= self.shard_tokens:
            self.close()

    def close(self) -> None:
        if not self._held:
            return
        name = f"{self.split}-{len(self.shards):05d}"
        files = {
            "tokens": (f"{name}.npy", np.concatenate(self._parts)),
            "documents": (f"{name}.documents.npy", np.asarray(self._ends, dtype=np.uint64)),
        }
        shard: dict[str, Any] = {
            "tokens": self._held,
            "documents": len(self._ends),
            "bytes": self._bytes,
        }
        for kind, (file, values) in files.items():
            save_array(self.folder / file, values)
            shard[f"{kind}_file"], shard[f"{kind}_sha256"] = file, sha256_of(self.folder / file)
        self.shards.append(shard)
        self._parts, self._ends, self._held, self._bytes = [], [], 0, 0


def save_array(path: Path, values: NDArray[Any]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, values)

    write_atomic(path, write)


def write_index(folder: Path, content: dict[str, Any]) -> None:
    """Last of all: a folder with an index is complete."""
    write_json_atomic(folder / "index.json", {"format": FORMAT, **content})


@dataclass(frozen=True)
class Shards:
    """A folder of shards, opened. Nothing is read into memory before it is asked for."""

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Raises UsageError when the folder is not complete or was written by another format."""
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"'{folder}' holds no tokenised text: it has no index.json. Make it with: bascule tokenize FILES --out {folder}"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(
                f"'{folder}/index.json' is damaged ({error}). Tokenise the text again."
            ) from None
        if index.get("format") != FORMAT:
            raise UsageError(
                f"'{folder}' has shards of format {index.get('format')}; this bascule reads {FORMAT}. Tokenise the text again."
            )
        return cls(folder, index)

    def verify(self) -> None:
        """Read every file and compare its SHA-256. Raises UsageError naming the first that differs."""
        for split in SPLITS:
            for shard in self.index[split]:
                for kind in ("tokens", "documents"):
                    self._verify(shard[f"{kind}_file"], shard[f"{kind}_sha256"])
        self._verify("token_bytes.npy", self.index["token_bytes_sha256"])

    def _verify(self, name: str, announced: str) -> None:
        path = self.folder / name
        found = sha256_of(path) if path.is_file() else "nothing"
        if found != announced:
            raise UsageError(
                f"'{path}' has SHA-256 {found[:12]}, index.json says {announced[:12]}: the file is damaged or was exchanged. "
                "Tokenise the text again."
            )

    def digest(self) -> str:
        """SHA-256 of the index, and so of everything it names."""
        return sha256_of(self.folder / "index.json")

    def token_bytes(self) -> NDArray[np.int64]:
        return np.asarray(np.load(self.folder / "token_bytes.npy"), dtype=np.int64)

    def text(self, split: str) -> Text:
        found = self.index[split]
        return Text(
            [np.load(self.folder / one["tokens_file"], mmap_mode="r") for one in found],
            [np.load(self.folder / one["documents_file"]) for one in found],
        )


class Text:
    """The tokens of one split as one long row, and where its documents end."""

    def __init__(self, parts: list[NDArray[Any]], ends: list[NDArray[Any]]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        shifted = [one.astype(np.int64) + at for one, at in zip(ends, self._starts, strict=False)]
        self.document_ends = np.concatenate([np.zeros(0, np.int64), *shifted])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens `start .. start+count-1`; fewer at the end."""
        found = []
        for part, at in zip(self._parts, self._starts, strict=False):
            low, high = max(0, start - int(at)), min(len(part), start + count - int(at))
            if low < high:
                found.append(np.asarray(part[low:high], dtype=np.int64))
        return np.concatenate([np.zeros(0, np.int64), *found])

    def documents(self, start: int, count: int) -> NDArray[np.int64]:
        """The number of the document that each of those tokens belongs to."""
        positions = np.arange(start, start + count)
        return np.searchsorted(self.document_ends, positions, side="right").astype(np.int64)


class Order:
    """Which windows of `length` tokens a step reads: an endless stream of shuffled epochs over the text.

    Window w of an epoch begins at `shift + w * length`; the shift differs from epoch to epoch, so that the cuts do. Everything is
    a function of (seed, epoch, place in the epoch) alone: a resumed run reads on where it stood, and any number of ranks that
    share a step read together what one would.
    """

    def __init__(self, tokens: int, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self.windows = (tokens - 1) // length - 1
        if self.windows < 1:
            raise UsageError(
                f"The text has {tokens} tokens, windows of {length} need at least {2 * length + 1}. Add text, or lower "
                "pretrain.sequence_length."
            )
        self._epoch = -1
        self._shuffled = np.zeros(0, np.int64)
        self._shift = 0

    def starts(self, first: int, count: int) -> list[int]:
        """First tokens of the windows number `first .. first+count-1` of the stream."""
        return [self._start(number) for number in range(first, first + count)]

    def share(self, index: int, batch: int, *, rank: int = 0, ranks: int = 1) -> list[int]:
        """The windows of step `index` (from 0) that `rank` reads; all ranks together read `batch` windows.

        Raises UsageError when the ranks cannot share the batch evenly.
        """
        if batch % ranks:
            raise UsageError(
                f"A batch of {batch} sequences cannot be shared by {ranks} ranks; make batch_sequences a multiple."
            )
        each = batch // ranks
        return self.starts(index * batch + rank * each, each)

    def _start(self, number: int) -> int:
        epoch, place = divmod(number, self.windows)
        if (
            epoch != self._epoch
        ):  # kept: shuffling a million windows at every step would cost more than reading them
            self._shuffled = draws.permutation(
                draws.key(self.seed, "pretrain.order", epoch), self.windows
            )
            shift = draws.integers(draws.key(self.seed, "pretrain.shift", epoch), self.length, 1)
            self._epoch, self._shift = epoch, int(shift[0])
        return self._shift + int(self._shuffled[place]) * self.length
