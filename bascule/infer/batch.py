"""The rows that run together: prompts join between steps, finished rows leave at once, the cache stays one solid block.

Rows occupy slots 0..n-1 of a preallocated cache. A new row takes slot n; when a row leaves, the last row moves into its slot
(one copy of one row), so a step always reads a plain view and never pays for rows that are done. Long prompts are read in
chunks in a cache of their own and copied in when they are complete: the others keep talking meanwhile.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bascule.errors import NonFiniteLogits, UsageError
from bascule.infer.packed import pack
from bascule.infer.prefix import PrefixStore
from bascule.infer.sampling import Draws, Knobs, Sampling, choose, edits
from bascule.model.cache import Cache
from bascule.model.transformer import Transformer


class Constraint(Protocol):
    """What a row may say next, when that is not up to the model alone (a grammar). It sees every token in order."""

    def allowed(self) -> NDArray[np.bool_]:
        """True for every token of the vocabulary that may come now; at least one."""
        ...

    def take(self, token: int) -> None: ...


@dataclass(eq=False)
class Row:
    """One sequence on its way. `said` are the tokens of the completion so far; `finish` is set when it ends.

    A row may begin with tokens said already (an engine that failed said them): they are read like the prompt, and its random
    numbers go on where they left off. `top`: how many alternatives to note in `tops` for each token, None for no note.
    """

    prompt: Sequence[int]
    sampling: Sampling
    index: int = 0
    top: int | None = None
    constraint: Constraint | None = None
    said: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self) -> None:
        self.draws = Draws(self.sampling, self.index)
        if self.constraint is not None:
            for token in self.said:
                self.constraint.take(token)

    @property
    def text(self) -> list[int]:
        """All tokens so far: what has to be read before the next one can be said."""
        return [*self.prompt, *self.said]


class Batch:
    """At most `slots` rows of at most `length` tokens, prompt included. Not thread-safe: one owner drives it.

    The model's weights must stay as they are while a batch lives: a small model is packed once, here.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int,
        length: int,
        eos_id: int,
        pad_id: int,
        prefixes: PrefixStore | None = None,
    ) -> None:
        self.model = model
        self.slots = slots
        self.length = length
        self.rows: list[Row] = []
        self._eos_id = eos_id
        self._pad_id = pad_id
        self._prefixes = prefixes
        self._device = model.lm_head.weight.device
        self._packed = pack(model)
        self._full = model.new_cache(slots, length, self._device)
        self._lengths: list[int] = []
        self._knobs: Knobs | None = None

    @property
    def free(self) -> int:
        return self.slots - len(self.rows)

    @property
    def used_tokens(self) -> int:
        return sum(self._lengths)

    @property
    def capacity_tokens(self) -> int:
        return self.slots * self.length

    def join(self, groups: Sequence[Sequence[Row]]) -> list[Row]:
        """Read one prompt per group and let all its rows start from it; every row gets its first token. Returns the rows.

        Rows of a group share their prompt. Rows that are done with their first token leave again at once.
        """
        prompts = [group[0].text for group in groups]
        cache = self.model.new_cache(len(groups), max(map(len, prompts)), self._device)
        tokens_BT, mask_BT = self._pad(prompts)
        last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        ragged = len(set(map(len, prompts))) > 1
        output = self.model(tokens_BT, mask=mask_BT if ragged else None, cache=cache, at_B=last_B)
        return self._enter(
            groups, cache, [len(prompt) for prompt in prompts], output.logits_BTV[:, 0]
        )

    def enter(self, rows: Sequence[Row], prefill: Prefill) -> list[Row]:
        """Let rows of one prompt start from its prefill, which is done."""
        assert prefill.logits_BV is not None
        if self._prefixes is not None:
            self._prefixes.keep(prefill.text, prefill.cache)
        return self._enter([rows], prefill.cache, [len(prefill.text)], prefill.logits_BV)

    def prefill(self, row: Row) -> Prefill:
        """Begin to read a row's text in chunks, from the longest prefix that is still in the store."""
        self._check_length(row)
        text = row.text
        cache = self.model.new_cache(1, len(text), self._device)
        known = 0 if self._prefixes is None else self._prefixes.fill(text, cache)
        return Prefill(self.model, text, cache, known)

    def step(self) -> list[Row]:
        """One more token for every row. Returns the rows that spoke, in slot order before anyone left."""
        if not self.rows:
            return []
        count = len(self.rows)
        cache = type(self._full)(tuple(buffer[:, :count] for buffer in self._full.buffers))
        cache.lengths_B = torch.tensor(self._lengths, device=self._device)
        cache.longest = max(self._lengths)
        cache.ragged = min(self._lengths) != cache.longest
        tokens_B = torch.tensor([row.said[-1] for row in self.rows], device=self._device)
        if self._packed is not None:
            logits_BV = self._packed.step(tokens_B, cache)
        else:
            logits_BV = self.model(tokens_B[:, None], cache=cache).logits_BTV[:, 0]
        self._lengths = [length + 1 for length in self._lengths]
        spoke = list(self.rows)
        self._speak(spoke, logits_BV, self._settings())
        self._drop_finished()
        return spoke

    def cancel(self, row: Row) -> None:
        """Drop a row whose reader went away. A row that already left is no matter."""
        if any(row is one for one in self.rows):
            row.finish = "cancelled"
            self._drop_finished()

    def clear(self) -> None:
        """Forget everything, buffers included: nothing may be answered from a cache a failing chip wrote."""
        self.rows, self._lengths, self._knobs = [], [], None
        for buffer in self._full.buffers:
            buffer.zero_()
        if self._prefixes is not None:
            self._prefixes.clear()

    def _enter(
        self,
        groups: Sequence[Sequence[Row]],
        cache: Cache,
        lengths: Sequence[int],
        logits_BV: Tensor,
    ) -> list[Row]:
        rows = [row for group in groups for row in group]
        for row in rows:
            self._check_length(row)
        if len(rows) > self.free:
            raise UsageError(
                f"{len(rows)} rows were to join {len(self.rows)} running ones; the batch holds {self.slots}."
            )
        start, longest = len(self.rows), max(lengths)
        source = torch.tensor(
            [at for at, group in enumerate(groups) for _ in group], device=self._device
        )
        for full, part in zip(self._full.buffers, cache.buffers, strict=True):
            full[:, start : start + len(rows), :longest] = part[:, :, :longest].index_select(
                1, source
            )
        self.rows += rows
        self._lengths += [
            length for group, length in zip(groups, lengths, strict=True) for _ in group
        ]
        self._knobs = None
        logits_BV = logits_BV.index_select(0, source)
        self._speak(rows, logits_BV, Knobs.of([row.sampling for row in rows], torch.device("cpu")))
        self._drop_finished()
        return rows

    def _speak(self, rows: Sequence[Row], logits_BV: Tensor, knobs: Knobs) -> None:
        """Sample on the host, whatever the chip: the cumulative sum has no deterministic kernel on CUDA, and a chip that computes
        wrong logits should not also be trusted to choose. The price is one copy of the logits a step."""
        logits_BV = logits_BV.to("cpu")
        if not bool(torch.isfinite(logits_BV.sum())):
            _refuse(rows, logits_BV)
        positions = [len(row.said) for row in rows]
        uniform = (
            [0.0] * len(rows)
            if knobs.all_greedy
            else [row.draws.at(at) for row, at in zip(rows, positions, strict=True)]
        )
        extra = edits(
            [row.sampling for row in rows],
            [row.said for row in rows],
            logits_BV.shape[1],
            logits_BV.device,
        )
        extra = _forbid(rows, logits_BV, extra)
        tokens_B, logprobs_B = choose(logits_BV, knobs, uniform, extra)
        if any(row.top is not None for row in rows):
            self._note_top(rows, logits_BV, tokens_B)
        for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            row.said.append(token)
            row.logprobs.append(logprob)
            if row.constraint is not None:
                row.constraint.take(token)
            if token == self._eos_id:
                row.finish = "stop"
            elif len(row.said) >= row.sampling.max_tokens:
                row.finish = "length"

    def _note_top(self, rows: Sequence[Row], logits_BV: Tensor, tokens_B: Tensor) -> None:
        """For readers who ask: the chosen token first, then the `top` likeliest, under the model's own distribution (T=1)."""
        for row, logits_V, token in zip(rows, logits_BV, tokens_B.tolist(), strict=True):
            if row.top is not None:
                logprobs_V = torch.log_softmax(logits_V, dim=-1)
                best = logprobs_V.topk(row.top)
                ranked = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
                row.tops.append([(token, float(logprobs_V[token])), *ranked])

    def _drop_finished(self) -> None:
        for at in reversed(range(len(self.rows))):
            if self.rows[at].finish is not None:
                self._drop(at)

    def _drop(self, at: int) -> None:
        last = len(self.rows) - 1
        if at != last:
            used = self._lengths[last]
            for buffer in self._full.buffers:
                buffer[:, at, :used] = buffer[:, last, :used]
            self.rows[at], self._lengths[at] = self.rows[last], self._lengths[last]
        self.rows.pop()
        self._lengths.pop()
        self._knobs = None

    def _settings(self) -> Knobs:
        if self._knobs is None:
            self._knobs = Knobs.of([row.sampling for row in self.rows], torch.device("cpu"))
        return self._knobs

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, prompts))
        tokens = [[*prompt, *[self._pad_id] * (longest - len(prompt))] for prompt in prompts]
        mask = [[True] * len(prompt) + [False] * (longest - len(prompt)) for prompt in prompts]
        return torch.tensor(tokens, device=self._device), torch.tensor(mask, device=self._device)

    def _check_length(self, row: Row) -> None:
        if not row.prompt:
            raise UsageError("A prompt holds no token; give it at least one.")
        needed = len(row.prompt) + row.sampling.max_tokens
        if needed > self.length:
            raise UsageError(
                f"The prompt has {len(row.prompt)} tokens and max_tokens is {row.sampling.max_tokens}, {needed} together; "
                f"at most {self.length} fit. Shorten the prompt or ask for fewer tokens."
            )


def score(
    model: Transformer, text: Sequence[int], top: int, temperature: float = 1.0
) -> list[list[tuple[int, float]]]:
    """What the model thinks of each token of a text but the first: the token itself, then the `top` likeliest.

    Log-probabilities are those of softmax(logits / temperature).
    """
    tokens_1T = torch.tensor([list(text)], device=model.lm_head.weight.device)
    logits_TV = model(tokens_1T).logits_BTV[0, :-1].to("cpu")
    if not bool(torch.isfinite(logits_TV.sum())):
        raise NonFiniteLogits(
            "The chip returned NaN or infinity among the logits of a prompt; logits must be finite. Qualify the chip again before using it."
        )
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    own = logprobs_TV.gather(1, tokens_1T[0, 1:, None].to("cpu"))[:, 0].tolist()
    best = logprobs_TV.topk(top, dim=-1)
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        [(token, logprob), *zip(tokens, values, strict=True)]
        for token, logprob, (tokens, values) in zip(text[1:], own, ranked, strict=True)
    ]


class Prefill:
    """A text being read in chunks into a cache of its own. `known` tokens came from the prefix store."""

    def __init__(self, model: Transformer, text: Sequence[int], cache: Cache, known: int) -> None:
        self.text = text
        self.cache = cache
        self.known = known
        self.read = known
        self.logits_BV: Tensor | None = None
        self._model = model

    @property
    def done(self) -> bool:
        return self.logits_BV is not None

    def advance(self, tokens: int) -> int:
        """Read at most `tokens` more; returns how many were read. `logits_BV` is set with the last one."""
        chunk = self.text[self.read : self.read + tokens]
        tokens_1T = torch.tensor([list(chunk)], device=self.cache.lengths_B.device)
        last_1 = torch.tensor([len(chunk) - 1], device=tokens_1T.device)
        output = self._model(tokens_1T, cache=self.cache, at_B=last_1)
        self.read += len(chunk)
        if self.read == len(self.text):
            self.logits_BV = output.logits_BTV[:, 0]
        return len(chunk)


def _forbid(rows: Sequence[Row], logits_BV: Tensor, extra_BV: Tensor | None) -> Tensor | None:
    """Minus infinity on what a row's grammar does not allow now."""
    for at, row in enumerate(rows):
        if row.constraint is not None:
            extra_BV = torch.zeros_like(logits_BV) if extra_BV is None else extra_BV
            extra_BV[at, ~torch.from_numpy(row.constraint.allowed())] = float("-inf")
    return extra_BV


def _refuse(rows: Sequence[Row], logits_BV: Tensor) -> None:
    bad = (~torch.isfinite(logits_BV)).any(dim=1)
    position = len(rows[int(bad.int().argmax())].said)
    raise NonFiniteLogits(
        f"The chip returned NaN or infinity among the logits of {int(bad.sum())} of {len(rows)} sequences (first at token {position} "
        "of a completion); logits must be finite. Nothing was sampled from them. Qualify the chip again before using it."
    )
