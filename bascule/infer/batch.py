"""The rows that run together: prompts join between steps, finished rows leave at once, memory is given out block by block.

Rows occupy places 0..n-1; when a row leaves, the last row takes its place. Long prompts are read in chunks between the steps of
the others. When no block is left for a row that grows, the row that arrived last is preempted: its blocks go to the others, and
whoever drives the batch finds it in `preempted` and lets it join again, where what it had read is read once more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bascule.accelerators.base import Recorder
from bascule.errors import UsageError
from bascule.infer.blocks import Blocks, OutOfBlocks, blocks_for
from bascule.infer.linear import Precision
from bascule.infer.row import Row
from bascule.infer.runner import Runner
from bascule.infer.sampling import Knobs
from bascule.infer.speak import HOST, alike, draw, note, speak, suppose
from bascule.model.pages import BLOCK
from bascule.model.transformer import Transformer

CHUNK = 256  # tokens of a long prompt read at once: about what the others wait for it


class Batch:
    """At most `slots` rows of at most `length` tokens, prompt included. Not thread-safe: one owner drives it.

    `tokens`: what the cache holds for all rows together, at least one row of `length`; None for the most they can grow to.
    `share`: rows that begin alike share blocks, also with rows that left. `reproducible`: equal bits whatever else runs (runner.py);
    then nothing is shared across requests, because a prefix read by another request was read in other chunks.
    `precision` is that of the large matrices of a larger model (linear.py). `preemptions` counts rows sent back for want of blocks.
    `native`: steps are compiled code where there is a compiler and the chip is a CPU in fp32 or int8 (decoder.py); never where a simulated fault of
    inference has to act (engine.py). `record`: the chip's, to play steps back (recorded.py).
    `speculate`: while at most so many rows run, the prediction layer guesses a token ahead (draft.py); of `guessed` ones `kept` were
    right. A row that ran beside more rows than that goes on without guesses.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int,
        length: int,
        eos_id: int,
        pad_id: int,
        tokens: int | None = None,
        share: bool = False,
        reproducible: bool = False,
        precision: Precision = "fp32",
        speculate: int = 0,
        native: bool = False,
        record: Recorder | None = None,
    ) -> None:
        self.model = model
        self.slots = slots
        self.length = length
        self.reproducible = reproducible
        self.rows: list[Row] = []
        self.preempted: list[Row] = []
        self.preemptions = self.guessed = self.kept = 0
        most = slots * blocks_for(length)
        count = most if tokens is None else min(most, max(tokens // BLOCK, blocks_for(length)))
        self.blocks = Blocks(count)
        self._runner = Runner(
            model, count, length=length, pad_id=pad_id, fixed=reproducible, precision=precision, speculate=speculate > 0, native=native,
            record=record,
        )  # fmt: skip
        self._drafter = self._runner.drafter
        self._speculate = speculate
        self._eos_id = eos_id
        self._share = share and not reproducible
        self._tables = np.zeros((slots, blocks_for(length)), dtype=np.int64)
        self._read = np.zeros(slots, dtype=np.int64)
        self._knobs: dict[int, Knobs] = {}
        self._arrivals = 0

    @property
    def reader(self) -> Transformer:
        """The model as this batch computes it, for texts that are read whole."""
        return self._runner.reader

    @property
    def precision(self) -> Precision:
        """What its matrices really have: a small model or one on another chip has no second precision."""
        return self._runner.precision

    @property
    def native(self) -> bool:
        """Are its steps compiled code?"""
        return self._runner.decoder is not None

    @property
    def records(self) -> bool:
        """Are its steps recordings that the chip plays?"""
        return self._runner.recorded is not None

    @property
    def trouble(self) -> str:
        """Why a step could not be recorded; empty while none failed."""
        return "" if self._runner.recorded is None else self._runner.recorded.trouble

    @property
    def free(self) -> int:
        return self.slots - len(self.rows)

    @property
    def used_tokens(self) -> int:
        """Tokens of the blocks that are held; a shared block counts once."""
        return (self.blocks.count - self.blocks.free) * BLOCK

    @property
    def capacity_tokens(self) -> int:
        return self.blocks.count * BLOCK

    @property
    def block_bytes(self) -> int:
        return self._runner.pages.block_bytes

    def fits(self, groups: Sequence[Sequence[Row]], *, reserved: int = 0) -> bool:
        """Are there places, and blocks for these groups and for the next token of everyone? One group always fits when it is
        alone. `reserved`: rows whose prompt is being read."""
        rows = len(self.rows) + reserved
        wanted = rows + sum(blocks_for(group[0].size) + len(group) for group in groups)
        alone = len(groups) == 1 and self.blocks.free == self.blocks.count
        places = rows + sum(map(len, groups)) <= self.slots
        return places and (alone or wanted <= self.blocks.free)

    def join(self, groups: Sequence[Sequence[Row]]) -> list[Row]:
        """Read one prompt per group and let all its rows start from it. Returns the rows that said their first token.

        Rows of a group share their text. Rows that are done with their first token leave again at once.
        """
        if self.reproducible:
            return [row for group in groups for row in self._join_alone(group)]
        for row in (row for group in groups for row in group):
            self._check_length(row)
        texts = [group[0].text for group in groups]
        tables = [self._take(blocks_for(len(text))) for text in texts]
        said = self._runner.read_together(texts, tables)
        return self._enter(groups, tables, [len(text) for text in texts], *said)

    def prefill(self, row: Row) -> Prefill:
        """Begin to read a row's text in chunks, after the longest prefix that is still known. `enter` or `drop` it afterwards."""
        self._check_length(row)
        text = list(row.prompt) if self.reproducible else row.text
        known = self.blocks.find(text) if self._share else []
        try:
            new = self._take(blocks_for(len(text)) - len(known))
        except OutOfBlocks:
            self.blocks.release(known)
            raise
        return Prefill(self._runner, text, [*known, *new], len(known) * BLOCK)

    def drop(self, prefill: Prefill) -> None:
        self.blocks.release(prefill.blocks)

    def enter(self, rows: Sequence[Row], prefill: Prefill) -> list[Row]:
        """Let rows of one text start from its prefill, which is done. Returns the rows that said a token."""
        assert prefill.logits_BV is not None and prefill.hidden_BD is not None
        if self._share:
            self.blocks.keep(prefill.text, prefill.blocks)
        lengths = [len(prefill.text)]
        return self._enter([rows], [prefill.blocks], lengths, prefill.logits_BV, prefill.hidden_BD)

    def step(self) -> list[Row]:
        """One more token read for every row, two where a guess was right. Returns the rows that spoke, in the order of their places
        before anyone left; a row that said two tokens comes twice."""
        self._grow()
        if not self.rows:
            return []
        count, rows = len(self.rows), list(self.rows)
        guesses = self._guess()
        ahead = [at for at, row in enumerate(rows) if row in guesses]
        read = np.concatenate([self._read[:count], self._read[ahead] + 1])
        tables = self._tables[[*range(count), *ahead]] if ahead else self._tables[:count]
        if not self.reproducible:
            tables = tables[:, : blocks_for(int(read.max()) + 1)]
        tokens = [*(row.token(row.read) for row in rows), *(guesses[rows[at]] for at in ahead)]
        logits, hidden = self._runner.step(tokens, tables, read)
        for at, row in enumerate(rows):
            row.read += 1
            row.unpaired = [hidden[at]] if row.unpaired else None
        self._read[:count] += 1
        if ahead and all(alike(row) and row.read == row.size for row in rows):
            return self._speak_twice(rows, ahead, guesses, logits, hidden)
        spoke = self._speak(rows, logits[:count])
        after = {rows[at]: number for number, at in enumerate(ahead, start=count)}
        right = [row for row in self.rows if row in after and row.token(row.read) == guesses[row]]
        if not right:
            return spoke
        self.kept += len(right)
        for row in right:
            row.read += 1
            row.unpaired = [*(row.unpaired or ()), hidden[after[row]]]
        self._read[: len(self.rows)] = [row.read for row in self.rows]
        return spoke + self._speak(right, logits[[after[row] for row in right]])

    def _speak_twice(
        self, rows: list[Row], ahead: list[int], guesses: dict[Row, int], logits_BV: Tensor, hidden_BD: Tensor
    ) -> list[Row]:  # fmt: skip
        """Draw the next token of all `rows` and the one after it of those at `ahead` in one go, which costs what one draw costs; keep
        the second where the first is what was guessed."""
        both = [*rows, *(rows[at] for at in ahead)]
        drawn = draw(both, logits_BV.to(HOST), self._settings(both), ahead=len(ahead))
        tokens, logprobs = drawn[0].tolist(), drawn[1].tolist()
        note(rows, tokens[: len(rows)], logprobs[: len(rows)], self._eos_id)
        spoke = list(rows)
        for number, at in enumerate(ahead, start=len(rows)):
            row = rows[at]
            if row.finish is None and tokens[at] == guesses[row]:
                row.read += 1
                self._read[at] += 1
                row.unpaired = [*(row.unpaired or ()), hidden_BD[number]]
                note([row], [tokens[number]], [logprobs[number]], self._eos_id)
                spoke.append(row)
        self.kept += len(spoke) - len(rows)
        self._drop_finished()
        return spoke

    def _guess(self) -> dict[Row, int]:
        """The next token of the rows that may have two more, as the prediction layer sees it."""
        if self._drafter is None:
            return {}
        asking = [
            row
            for row in self.rows
            if self._may_guess(row) and row.read + 1 < len(row.blocks) * BLOCK
        ]
        for row in self.rows:
            if row not in asking:
                row.unpaired = None  # it stays so: a pair left out would be missing for good
        if not asking:
            return {}
        pairs = [(row, row.read + 1 - back) for row in asking for back in range(len(row.unpaired or ()), 0, -1)]  # fmt: skip
        places = [self.rows.index(row) for row, _ in pairs]
        last = [at for at, (row, slot) in enumerate(pairs) if slot == row.read]
        slots = np.array([slot for _, slot in pairs])
        logits_BV = self._drafter.guess(
            torch.stack([hidden_D for row in asking for hidden_D in row.unpaired or ()]),
            [row.token(slot) for row, slot in pairs],
            self._tables[places, : blocks_for(int(slots.max()) + 1)], slots, last,
        )  # fmt: skip
        guesses = suppose(asking, logits_BV.to(HOST), self._settings(asking))
        self.guessed += len(asking)
        return {
            row: row.token(row.read + 1) if row.read + 1 < row.size else guess
            for row, guess in zip(asking, guesses, strict=True)
        }

    def _may_guess(self, row: Row) -> bool:
        few = len(self.rows) <= self._speculate
        return few and row.unpaired is not None and row.sampling.max_tokens - len(row.said) >= 2

    def cancel(self, row: Row) -> None:
        """Drop a row whose reader went away. A row that already left is no matter."""
        if any(row is one for one in self.rows):
            row.finish = "cancelled"
            self._drop_finished()

    def _join_alone(self, group: Sequence[Row]) -> list[Row]:
        prefill = self.prefill(group[0])
        while not prefill.done:
            prefill.advance()
        return self.enter(group, prefill)

    def _enter(
        self,
        groups: Sequence[Sequence[Row]],
        tables: Sequence[list[int]],
        lengths: Sequence[int],
        logits_GV: Tensor,
        hidden_GD: Tensor,
    ) -> list[Row]:
        entered, source = [], []
        for at, (group, blocks, length) in enumerate(zip(groups, tables, lengths, strict=True)):
            for row, own in zip(group, self._fork(blocks, length, len(group)), strict=True):
                if own is None:
                    self._send_back(row)
                    continue
                row.blocks, row.read = own, length
                row.unpaired = None if self._drafter is None else [hidden_GD[at]]
                self._seat(row)
                entered.append(row)
                source.append(at)
        chosen = torch.tensor(source, device=logits_GV.device)
        return self._speak(entered, logits_GV.index_select(0, chosen))

    def _fork(self, blocks: list[int], length: int, rows: int) -> list[list[int] | None]:
        """Tables for the rows of a group: full blocks are shared, each row gets a copy of the one it will write to."""
        full = length // BLOCK
        tables: list[list[int] | None] = [blocks]
        for _ in range(rows - 1):
            try:
                own = self.blocks.take(len(blocks) - full)
            except OutOfBlocks:
                tables.append(None)
                continue
            for source, target in zip(blocks[full:], own, strict=True):
                self._runner.pages.copy(source, target)
                if self._drafter is not None:
                    self._drafter.pages.copy(source, target)
            self.blocks.share(blocks[:full])
            tables.append([*blocks[:full], *own])
        return tables

    def _seat(self, row: Row) -> None:
        at = len(self.rows)
        if at == self.slots:
            raise UsageError(f"A row was to join {at} running ones; the batch holds {self.slots}.")
        self._check_length(row)
        if not row.arrived:
            self._arrivals += 1
            row.arrived = self._arrivals
        self.rows.append(row)
        self._tables[at] = 0
        self._tables[at, : len(row.blocks)] = row.blocks
        self._read[at] = row.read
        self._knobs.clear()

    def _grow(self) -> None:
        """A block for every row whose last one is full, or would be with a guess; who arrived last gives way to the others."""
        if all(row.read + 1 < len(row.blocks) * BLOCK for row in self.rows):
            return
        taken: list[int] = []
        for row in sorted(self.rows, key=lambda one: one.arrived):
            while row.blocks and row.read + self._may_guess(row) >= len(row.blocks) * BLOCK:
                try:
                    new = self.blocks.take(1)
                except OutOfBlocks:
                    self._preempt(max(self.rows, key=lambda one: one.arrived))
                    continue
                self._tables[self.rows.index(row), len(row.blocks)] = new[0]
                row.blocks += new
                taken += new
        self._clean(taken)  # all at once: a call for each cost more than the rest of this

    def _take(self, count: int) -> list[int]:
        taken = self.blocks.take(count)
        self._clean(taken)
        return taken

    def _clean(self, blocks: Sequence[int]) -> None:
        self._runner.pages.clean(blocks)
        if self._drafter is not None:
            self._drafter.pages.clean(blocks)

    def _preempt(self, row: Row) -> None:
        self._remove(next(at for at, one in enumerate(self.rows) if one is row))
        self._send_back(row)

    def _send_back(self, row: Row) -> None:
        self.preempted.append(row)
        self.preemptions += 1

    def _speak(self, rows: list[Row], logits_BV: Tensor) -> list[Row]:
        """Rows that have read all they said say one more; a row that was sent back may still be catching up."""
        if all(row.read == row.size for row in rows):
            spoke = rows
        else:
            speaking = [at for at, row in enumerate(rows) if row.read == row.size]
            logits_BV, spoke = logits_BV[speaking], [rows[at] for at in speaking]
        if spoke:
            speak(spoke, logits_BV, self._settings(spoke), self._eos_id)
            self._drop_finished()
        return spoke

    def _drop_finished(self) -> None:
        for at in reversed(range(len(self.rows))):
            if self.rows[at].finish is not None:
                self._remove(at)

    def _remove(self, at: int) -> None:
        row, last = self.rows[at], len(self.rows) - 1
        self.blocks.release(row.blocks)
        row.blocks, row.read, row.unpaired = [], 0, None
        if at != last:
            self.rows[at] = self.rows[last]
            self._tables[at], self._read[at] = self._tables[last], self._read[last]
        self.rows.pop()
        self._knobs.clear()

    def _settings(self, rows: list[Row]) -> Knobs:
        """Kept for all rows, and for all of them twice."""
        if len(rows) not in (len(self.rows), 2 * len(self.rows)):
            return Knobs.of([row.sampling for row in rows], HOST)
        if len(rows) not in self._knobs:
            self._knobs[len(rows)] = Knobs.of([row.sampling for row in rows], HOST)
        return self._knobs[len(rows)]

    def _check_length(self, row: Row) -> None:
        if not row.prompt:
            raise UsageError("A prompt holds no token; give it at least one.")
        if row.most > self.length:
            raise UsageError(
                f"The prompt has {len(row.prompt)} tokens and max_tokens is {row.sampling.max_tokens}, {row.most} together; "
                f"at most {self.length} fit. Shorten the prompt or ask for fewer tokens."
            )


class Prefill:
    """A text being read in chunks into blocks of its own. `known` tokens of it were found in shared blocks."""

    def __init__(self, runner: Runner, text: Sequence[int], blocks: list[int], known: int) -> None:
        self.text = text
        self.blocks = blocks
        self.known = known
        self.read = known
        self.logits_BV: Tensor | None = None
        self.hidden_BD: Tensor | None = None
        self._runner = runner

    @property
    def done(self) -> bool:
        return self.logits_BV is not None

    def advance(self, tokens: int = CHUNK) -> int:
        """Read at most `tokens` more (always CHUNK in reproducible mode); returns how many. `logits_BV` is set with the last one."""
        chunk = self.text[self.read : self.read + (CHUNK if self._runner.fixed else tokens)]
        logits_BV, self.hidden_BD = self._runner.read_on(
            chunk, self.blocks, self.read, self.hidden_BD
        )
        self.read += len(chunk)
        if self.read == len(self.text):
            self.logits_BV = logits_BV
        return len(chunk)
