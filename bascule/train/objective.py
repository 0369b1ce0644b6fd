"""What a phase asks of a step: which batch, which loss, which optimizer. Shapes: B rows, T positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bascule import draws
from bascule.config.training import PretrainConfig, SftConfig
from bascule.model import count, fused, kernels
from bascule.model.transformer import Output, Transformer
from bascule.train.optimizer import SplitOptimizer
from bascule.train.state import StateDict


@dataclass(frozen=True)
class Batch:
    """The input of one optimizer step, on the CPU. `notes` are figures known before the step (reward, mismatch).

    `tensors` always holds `tokens` (B,T) int64, `real` (B,T) bool (not padding), `targets` (B,T) int64 (the next token) and
    `mask` (B,T) fp32, 1 where a target counts; a phase may add its own. A batch without tensors is a step with nothing to learn: it commits as a no-op.
    """

    phase: str
    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not self.tensors


class Objective(Protocol):
    """One phase. Steps are numbered over the whole run from 1; the phase owns `first_step` .. `first_step + steps - 1`."""

    phase: str
    first_step: int
    steps: int
    clip_grad_norm: float

    def new_optimizer(self, model: nn.Module) -> SplitOptimizer: ...

    def learning_rate(self, step: int) -> tuple[float, float]:
        """(factor of the peak rates, the AdamW group's rate that results)."""
        ...

    def next_batch(self, step: int) -> Batch:
        """The batch of `step`: a pure function of (seed, step), and in GRPO of the committed weights. Asking twice is free
        of effects: the second answer is the first."""
        ...

    def loss(self, output: Output, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss in nats per token, scalar metrics), on the chip that made `output`."""
        ...

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state: StateDict) -> None: ...


Phase = TypeVar("Phase", SftConfig, PretrainConfig)


class FromText(Generic[Phase]):
    """What the phases that learn from given text have in common: Muon for matrices, and no state, since a batch is a function of
    (seed, step) alone."""

    config: Phase

    def new_optimizer(self, model: nn.Module) -> SplitOptimizer:
        return SplitOptimizer(
            dict(model.named_parameters()),
            learning_rate=self.config.learning_rate,
            muon_learning_rate=self.config.muon_learning_rate,
            muon_momentum=self.config.muon_momentum,
            weight_decay=self.config.weight_decay,
        )

    def state_dict(self) -> StateDict:
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        del state


def choose(seed: int, purpose: str, start: int, count: int, population: int) -> list[int]:
    """Items `start .. start+count-1` of an endless stream of shuffled epochs over `population` items."""
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, offset = divmod(start + len(chosen), population)
        order = draws.permutation(draws.key(seed, purpose, epoch), population)
        chosen.extend(int(i) for i in order[offset : offset + count - len(chosen)])
    return chosen


def collate(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    """(prompt ids, completion ids) rows, right-padded to the longest: `tokens`, `real`, `targets`, `mask` as in Batch.

    Only completion tokens count. `real` keeps padding out of the expert loads that balance the router (under causal attention
    no real token sees a right-hand pad anyway); on a CPU it costs nothing measurable.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    full_BT = np.full((len(rows), width), pad_id, dtype=np.int64)
    real_BT = np.zeros((len(rows), width), dtype=np.bool_)
    mask_BT = np.zeros((len(rows), width), dtype=np.float32)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        full_BT[row, : len(prompt)] = prompt
        full_BT[row, len(prompt) : end] = completion
        real_BT[row, :end] = True
        mask_BT[row, len(prompt) : end] = 1.0
    return {
        "tokens": torch.from_numpy(full_BT[:, :-1].copy()),
        "real": torch.from_numpy(real_BT[:, :-1].copy()),
        "targets": torch.from_numpy(full_BT[:, 1:].copy()),
        "mask": torch.from_numpy(mask_BT[:, 1:].copy()),
    }


def seated(groups: Sequence[tuple[list[int], Sequence[list[int]]]], width: int) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of model/seats.py for the rows of `collate`, which are the completions of one prompt after the other's. A row's last token predicts nothing and is not
    worked out."""
    rows = sum(len(said) for _, said in groups)
    seats_BT = np.zeros((rows, width), np.int64)
    places, copies, picks, counted = [], [], [], []
    row = tokens = 0
    for prompt, said in groups:
        known, shared = len(prompt), tokens
        places.append(row * width + np.arange(known))
        copies.append(np.full(known, len(said)))
        tokens += known
        for completion in said:
            more = len(completion) - 1
            line = np.concatenate([np.arange(shared, shared + known), np.arange(tokens, tokens + more)])  # fmt: skip
            seats_BT[row, : known + more] = line
            places.append(row * width + known + np.arange(more))
            copies.append(np.ones(more, np.int64))
            picks.append(line[known - 1 :])
            counted.append(row * width + np.arange(known - 1, known + more))
            row, tokens = row + 1, tokens + more
    found = {"places": places, "copies": copies, "picks": picks, "counted": counted}
    joined = {name: np.concatenate(parts).astype(np.int64) for name, parts in found.items()}
    return {name: torch.from_numpy(values) for name, values in {"seats": seats_BT, **joined}.items()}  # fmt: skip


def packed(rows: Sequence[tuple[list[int], list[int]]], length: int, pad_id: int) -> dict[str, Tensor]:  # fmt: skip
    """`collate` with several rows in each window of at most `length` tokens, and `documents`, which numbers them: no row sees
    another. The longest come first and fill what room is left (first fit). The counted tokens are the same, so is the loss.
    Widths are whole sixteenths of `length`: few shapes, that come often enough to be recorded (recorded.py)."""
    windows: list[list[tuple[list[int], list[int]]]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row[0]) - len(row[1])):
        size = len(row[0]) + len(row[1]) - 1  # the last token is only a target
        at = next((i for i, left in enumerate(room) if left >= size), len(room))
        if at == len(room):
            windows.append([])
            room.append(max(length, size))
        windows[at].append(row)
        room[at] -= size
    fullest, grain = max(sum(len(p) + len(c) - 1 for p, c in window) for window in windows), max(1, length // 16)  # fmt: skip
    width = max(fullest, min(length, -(-fullest // grain) * grain))
    tensors = {
        "tokens": np.full((len(windows), width), pad_id, np.int64),
        "real": np.zeros((len(windows), width), np.bool_),
        "targets": np.full((len(windows), width), pad_id, np.int64),
        "mask": np.zeros((len(windows), width), np.float32),
        "documents": np.full((len(windows), width), -1, np.int64),
    }
    for w, window in enumerate(windows):
        start = 0
        for number, (prompt, completion) in enumerate(window):
            ids = prompt + completion
            end = start + len(ids) - 1
            tensors["tokens"][w, start:end], tensors["targets"][w, start:end] = ids[:-1], ids[1:]
            tensors["real"][w, start:end] = True
            tensors["mask"][w, end - len(completion) : end] = 1.0
            tensors["documents"][w, start:end] = number
            start = end
    return {name: torch.from_numpy(values) for name, values in tensors.items()}


def spread(rows: Sequence[Sequence[float]], mask_BT: Tensor) -> Tensor:
    """Per-completion-token numbers, laid out where `mask_BT` is 1 and 0 elsewhere; fp32."""
    flat = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
    return torch.zeros_like(mask_BT).masked_scatter(mask_BT.bool(), flat)


def token_logprobs(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Log-probability of each target, (B,T) fp32."""
    logits = logits_BTV.float()
    if kernels.usable(logits):
        return fused.token_logprobs(logits, targets_BT)
    picked_BT = logits.gather(-1, targets_BT[..., None])[..., 0]
    return picked_BT - logits.logsumexp(-1)


def head_later(model: Transformer, tensors: Mapping[str, Tensor]) -> bool:
    """Are the logits of this batch too large to keep? A function of shapes alone, so that a replay does as the step did."""
    rows = tensors["picks" if "seats" in tensors else "tokens"].numel()
    return 4 * rows * model.config.vocab_size > count.KEPT_LOGITS_BYTES


def ask_head(
    output: Output, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Callable[[], Tensor]]:
    """(log-probability in nats of each of `targets` (R,T), fp32; what gives the entropies (R,T) in nats, without a gradient): from the
    logits (R,T,V), or from the head where they were left out."""
    if output.head is not None:
        hidden_MD = output.hidden_BTD.flatten(0, 1)
        logp_M, entropy_M = output.head(hidden_MD, targets.flatten(), temperature)
        return logp_M.view_as(targets), lambda: entropy_M.view_as(targets)
    logits = output.logits_BTV if temperature == 1.0 else output.logits_BTV / temperature
    return token_logprobs(logits, targets), lambda: _entropies(logits)


def _entropies(logits: Tensor) -> Tensor:
    logp = logits.detach().float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def counted_logprobs(
    output: Output, tensors: Mapping[str, Tensor], temperature: float = 1.0
) -> Tensor:
    """Log-probability of each target, (B,T) fp32; of those that count alone where the batch has seats, 0 elsewhere."""
    return counted_readout(output, tensors, temperature)[0]


def counted_readout(
    output: Output, tensors: Mapping[str, Tensor], temperature: float = 1.0
) -> tuple[Tensor, Callable[[], Tensor]]:
    """`counted_logprobs`, and what gives the mean entropy in nats at the positions that count, without a gradient (of kept logits it
    is another pass over them, which SFT does without)."""
    targets_BT = tensors["targets"]
    if "seats" not in tensors:
        logp_BT, entropies = ask_head(output, targets_BT, temperature)
        mask_BT = tensors["mask"]
        return logp_BT, lambda: (entropies() * mask_BT).sum() / mask_BT.sum()
    where_M = tensors[
        "counted"
    ]  # not the mask itself: its ones would have to be counted first, which stops a GPU
    found_1M, entropies = ask_head(output, targets_BT.flatten()[where_M][None], temperature)
    all_N = torch.zeros_like(tensors["mask"]).flatten()
    logp_BT = all_N.index_copy(0, where_M, found_1M[0]).view_as(targets_BT)
    return logp_BT, lambda: entropies().mean()
