"""Forward and backward pass of a step as one recording that the chip plays back, where a batch's shape comes often enough.

What a recording may not change is the run. Before it is played it has to give the very bits that the operators gave, for the batch it was
recorded with and the next two, with their weights: a value that the host knew while recording would stay in it for ever. It is not used
either where it would leave too little memory for the steps that the guard looks into. Those go operator by operator, and at each of them the
recording is held to the operators again: what it gets wrong later is the chip's fault like any other.

Whatever a replay learns from stands in `given`, at fixed places; everything else is the model's own weights and buffers, written in place.
On a real chip none of this has been run yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bascule.accelerators.base import Accelerator, Recorder
from bascule.train.gradients import Computed

RECORD_AFTER = 8
"""Steps of a shape before it is recorded: recording costs some three steps' time, and most shapes of SFT and GRPO never come again."""

TRIALS = 3
"""Steps that a recording must repeat bit for bit, the one it was taken at included."""

MOST_RECORDINGS = 4
"""Recordings kept at a time: each keeps a batch and its gradients beside the rest."""

MOST_COUNTED = 256
"""Shapes that are counted at a time: GRPO has another one at every step."""

Compute = Callable[[dict[str, Tensor]], Computed]


@dataclass
class _Shape:
    met: int = 0
    passed: int = 0
    given: dict[str, Tensor] = field(default_factory=dict)
    replay: Callable[[], None] | None = None
    made: Computed | None = None


class RecordedSteps:
    """Of one phase on one chip. `tell(words)` hears of each recording, `warn(words)` why there will be none."""

    def __init__(
        self, accelerator: Accelerator, record: Recorder, *, tell: Callable[[str], object], warn: Callable[[str], object],
    ) -> None:  # fmt: skip
        self._accelerator, self._record = accelerator, record
        self._tell, self._warn = tell, warn
        self._shapes: dict[object, _Shape] = {}
        self._refused = False

    def clear(self) -> None:
        """Forget all recordings, and that there were to be none: another phase has another loss and other shapes."""
        self._shapes.clear()
        self._refused = False

    def play(self, tensors: Mapping[str, Tensor]) -> Computed | None:
        """The step of this batch from its recording, in tensors of its own; None where there is none that has passed its trials."""
        shape = self._shapes.get(_key(tensors))
        return self._replayed(shape, tensors).copied() if shape and shape.passed >= TRIALS else None

    def held(self, tensors: Mapping[str, Tensor], computed: Computed) -> str:
        """What a recording in use makes otherwise of a batch that the operators `computed`; empty where it makes the same, or there is none."""
        shape = self._shapes.get(_key(tensors))
        return self._unlike(shape, tensors, computed) if shape and shape.passed >= TRIALS else ""

    def met(self, tensors: dict[str, Tensor], computed: Computed, compute: Compute) -> None:
        """Count a step that went operator by operator with nobody looking; when it is due, record its shape or put the recording to trial."""
        if self._refused:
            return
        if len(self._shapes) >= MOST_COUNTED:
            self._shapes = {key: one for key, one in self._shapes.items() if one.replay}
        shape = self._shapes.setdefault(_key(tensors), _Shape())
        shape.met += 1
        kept = sum(one.replay is not None for one in self._shapes.values())
        if shape.replay is None and (shape.met <= RECORD_AFTER or kept >= MOST_RECORDINGS):
            return
        words = "x".join(map(str, tensors["tokens"].shape))
        if why := self._trial(shape, tensors, computed, compute):
            self._refused = True
            self._shapes.clear()
            self._accelerator.empty_cache()
            self._warn(f"{why} (batches of {words} tokens)")
            return
        shape.passed += 1
        if shape.passed == TRIALS:
            self._tell(f"batches of {words} tokens are played back from a recording, which gave the operators' bits {TRIALS} times")  # fmt: skip

    def _trial(
        self, shape: _Shape, tensors: dict[str, Tensor], computed: Computed, compute: Compute
    ) -> str:
        """Why the recording may not be used."""
        use = self._accelerator.memory()
        needed_bytes = (use.peak_bytes or 0) - (use.allocated_bytes or 0)
        try:
            if shape.replay is None:
                self._take(shape, tensors, compute)
            found = self._unlike(shape, tensors, computed)
        except RuntimeError as error:
            return f"a step could not be recorded: {str(error).splitlines()[0]}"
        return found or self._crowded(needed_bytes)

    def _unlike(self, shape: _Shape, tensors: Mapping[str, Tensor], computed: Computed) -> str:
        made = self._replayed(shape, tensors).tensors()
        for name, right in computed.tensors().items():
            if not _same_bits(right, made[name]):
                return f"a recorded step gives other bits than its operators, first in {name}"
        return ""

    def _replayed(self, shape: _Shape, tensors: Mapping[str, Tensor]) -> Computed:
        assert shape.replay is not None and shape.made is not None
        for name, place in shape.given.items():
            place.copy_(tensors[name])
        shape.replay()
        return shape.made

    def _take(self, shape: _Shape, tensors: dict[str, Tensor], compute: Compute) -> None:
        shape.given = {name: one.clone() for name, one in tensors.items()}

        def run() -> None:
            shape.made = compute(shape.given)

        shape.replay = self._record(run)

    def _crowded(self, needed_bytes: int) -> str:
        free_bytes = self._accelerator.free_bytes()
        if free_bytes is None or free_bytes >= needed_bytes:
            return ""
        return f"a recording leaves {free_bytes >> 20} MiB free, and a step that the guard looks into needs {needed_bytes >> 20} MiB"


def _key(tensors: Mapping[str, Tensor]) -> object:
    return tuple((name, tuple(one.shape), one.dtype) for name, one in tensors.items())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.equal(*(x.contiguous().view(wide[x.element_size()]) for x in (one, other)))
