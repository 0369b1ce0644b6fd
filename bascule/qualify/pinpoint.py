"""Which operator carries what a whole model did wrong? Its calls are recorded where they happened and asked again one by one.

A finding on a layer, a training or a generation is of little use to a vendor; one call with its inputs is. Every call of the failing
run is held against fp64 *on the inputs it had there*, so that the first wrong one is a cause and not a consequence; for bits that
differ between equal runs, the first call that got equal inputs and gave unequal outputs. Where no single call is wrong the finding says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from bascule.dispatch import OperatorMode
from bascule.model import kernels
from bascule.qualify import reproduce
from bascule.qualify.context import CheckContext, ChipFailed
from bascule.qualify.hold import CPU, Miss, same_bits
from bascule.qualify.question import hold, play, question, shrunk
from bascule.qualify.trace import Call, signature_of, transplant

MOST_BYTES = 2**29  # of recorded tensors; what comes later is not looked at
LOOK_S = 20.0  # for holding recorded calls against fp64
Run = Callable[[], object]


@dataclass(frozen=True)
class _Happened:
    call: Call
    outputs: list[Tensor]


@dataclass
class _Record:
    calls: list[_Happened] = field(default_factory=list)
    nbytes: int = 0


class _Recorder(OperatorMode):
    """Keeps every call with copies of what went in and came out. The copies are made past all modes: a simulated chip does not
    compute them."""

    def __init__(self, record: _Record) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        full = self.record.nbytes > MOST_BYTES or func.is_view
        with nullcontext() if full else _disable_current_modes():  # type: ignore[no-untyped-call]
            kept = None if full else tree_map(_keep, (args, kwargs))
        out = func(*args, **kwargs)
        if kept is not None:
            with _disable_current_modes():  # type: ignore[no-untyped-call]
                self._add(func, kept, out, args, kwargs)
        return out

    def _add(self, func: Any, kept: Any, out: Any, args: Any, kwargs: Any) -> None:
        kept_args, kept_kwargs = kept
        signature = signature_of(func, kept_args, kept_kwargs)
        call = Call("seen", func, kept_args, kept_kwargs, signature)
        written = (args, kwargs) if call.mutates else ()
        outputs = [
            _keep(leaf) for leaf in tree_flatten((out, written))[0] if isinstance(leaf, Tensor)
        ]
        self.record.calls.append(_Happened(call, outputs))
        self.record.nbytes += sum(tensor.nbytes for tensor in (*call.tensors(), *outputs))


def _keep(leaf: Any) -> Any:
    return transplant(leaf, CPU) if isinstance(leaf, Tensor) else leaf


def _watch(context: CheckContext, run: Run, step: int) -> _Record:
    """In PyTorch's own operators: a script that stands alone cannot call ours, and they know no fp64."""
    record = _Record()
    try:
        with context.chip(step=step), _Recorder(record), kernels.plain():
            run()
    except ChipFailed:
        pass  # what came before it is recorded
    return record


def wrong_call(context: CheckContext, run: Run, step: int = 1) -> Miss | None:
    """The first call of `run` whose output is wrong for its inputs. `run` computes on the chip, opens no session of its own (inside
    which a simulated chip would act unseen), and changes nothing that lasts."""
    calls = _watch(context, run, step).calls
    ends_s = time.monotonic() + LOOK_S
    for happened in calls:
        if time.monotonic() > ends_s:
            break
        one = question(context.seed, happened.call, play)
        if one and (misses := hold(one, happened.outputs).misses):
            return misses[0]
    return None


def unsteady_call(context: CheckContext, run: Run, steps: tuple[int, int] = (1, 1)) -> Miss | None:
    """The first call that gives other bits than its equal in a second run (under another step number, if given)."""
    first, second = (_watch(context, run, step).calls for step in steps)
    for one, two in zip(first, second, strict=False):
        if one.call.signature != two.call.signature or not one.call.has_defined_value:
            continue
        if _equal(one.call.tensors(), two.call.tensors()) and not _equal(one.outputs, two.outputs):
            pairs = zip(one.outputs, two.outputs, strict=True)
            where = next(place for place, (a, b) in enumerate(pairs) if not same_bits(a, b))
            return Miss(one.call, where, "other bits from equal inputs", None, None)
    return None


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(left, right, strict=True))


def hand_over(context: CheckContext, miss: Miss | None) -> tuple[str, Path | None]:
    """(words to end a finding with, the stand-alone script)."""
    if miss is None:
        return (
            "; no single operator carries it (the calls of the run are right for the inputs they had), so there is no stand-alone script",
            None,
        )
    least = shrunk(context, miss) if miss.found else miss
    words = (
        f"; carried by {least.call.name} alone: {least.why}, smallest case {least.call.signature}"
    )
    return words, reproduce.operator_script(context, least)
