"""What a fault sees and what it may do: one matched operator call, or the start and the end of a session.

When a fault fires is a pure function of (seed, the spec's own seed, kind, role, step, index of the call among those that match
the spec inside this session), so that a resumed or replayed step meets the same corruption. A transient fault differs in one
point: it is gone on every later attempt at the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bascule import draws
from bascule.faults.catalogue import FaultSpec

CHUNK = 1024

# Composites (linear, matmul, einsum, scaled_dot_product_attention) reach a dispatch mode whole under inference_mode and in
# their parts elsewhere; mv and dot stay out, so that a guard's checksum by matrix-vector product does not move the count.
GROUPS: dict[str, frozenset[str]] = {
    "matmul": frozenset(
        {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear", "matmul", "einsum"}
        | {"_grouped_mm", "_scaled_mm", "_addmm_activation"}
    ),
    "softmax": frozenset({"_softmax", "softmax", "_safe_softmax"}),
    "attention": frozenset(
        {"attention", "scaled_dot_product_attention", "_scaled_dot_product_attention_math"}
        | {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"}
        | {"_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"}
    ),
    "attention_backward": frozenset(
        {"_scaled_dot_product_flash_attention_for_cpu_backward"}
        | {"_scaled_dot_product_flash_attention_backward"}
        | {"_scaled_dot_product_efficient_attention_backward"}
        | {"_scaled_dot_product_cudnn_attention_backward"}
    ),
    "all_reduce": frozenset(
        {"allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_coalesced"}
    ),
}


# A fused operator (model/kernels.py) does the work of these: what a chip gets wrong in the piece, it gets wrong in the whole.
PIECES: dict[str, frozenset[str]] = {
    **dict.fromkeys(("rms_norm", "add_rms_norm"), frozenset({"pow", "mean", "rsqrt"})),
    **dict.fromkeys(("swiglu", "swiglu_halves"), frozenset({"silu", "silu_"})),
    **dict.fromkeys(("swiglu_backward", "swiglu_halves_backward"), frozenset({"silu_backward"})),
    "token_logprobs": frozenset({"_log_softmax"}),
    "token_logprobs_backward": frozenset({"_log_softmax_backward_data"}),
    **dict.fromkeys(("adamw_", "_fused_adamw_"), frozenset({"addcdiv_"})),
}


class WorkLike(Protocol):
    """accelerators.base.Work, described from below: faults live under accelerators and cannot import it."""

    @property
    def role(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def attempt(self) -> int: ...


@dataclass(slots=True)
class Call:
    """One operator call on its way through the chip. `run()` computes it as asked; a fault may change args before, result after."""

    op: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    direction: str

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    @property
    def name(self) -> str:
        """With its library: aten::mm, bascule::attention."""
        return f"{getattr(self.func, 'namespace', 'aten')}::{self.op}"


@dataclass(frozen=True, slots=True)
class Touched:
    """What a firing did, for the ground-truth log: how many values, the first flat positions of them, anything else to say."""

    count: int = 0
    positions: tuple[int, ...] = ()
    detail: str = ""


class Fault:
    """A planted fault at work. Subclasses override `enter` and `drag` (the session) or `before` and `after` (one call).

    `on_calls` and `on_operands` say where it strikes: not at calls at all, at a call's operands, or else at its result.
    One instance lives as long as its accelerator, so faults that pile up (a leak) can; `begin` starts a session afresh.
    """

    on_calls = True
    on_operands = False
    fatal = False  # logged before it acts, because nothing can be logged after

    def __init__(self, spec: FaultSpec, seed: int) -> None:
        self.spec = spec
        self.seed = seed
        self._session = _Session(key=0, rate=0.0)

    def matches(self, op: str) -> bool:
        """Is `op`, an aten or c10d name without overload, among the operators that this fault strikes?"""
        pieces = PIECES.get(op, frozenset())
        return any(
            wanted in ("any", op) or wanted in pieces or op in GROUPS.get(wanted, ())
            for wanted in self.spec.ops
        )

    def may_act(self, work: WorkLike) -> bool:
        """Can this fault fire at all in `work`? If no fault can, the session costs nothing."""
        spec = self.spec
        return (
            work.role in spec.roles
            and work.step >= spec.onset_step
            and (spec.until_step is None or work.step <= spec.until_step)
            and not (spec.transient and work.attempt > 0)
        )

    def begin(self, work: WorkLike) -> None:
        """Start counting calls for a new session."""
        purpose = f"fault.{self.spec.kind}.{work.role}"
        self._session = _Session(
            key=draws.key(self.seed, purpose, self.spec.seed, work.step), rate=self._rate(work.step)
        )

    def suspend(self) -> Callable[[], None]:
        """Keep this session's count while a nested one runs; the returned function brings it back."""
        kept = self._session

        def resume() -> None:
            self._session = kept

        return resume

    def fires(self) -> int | None:
        """Count one matched call; its index when the fault fires on it, else None."""
        return self._session.next()

    def number(self, index: int, purpose: str) -> int:
        """64 random bits that belong to this call, for choosing positions and bits."""
        return draws.key(self._session.key, purpose, index)

    def enter(self, work: WorkLike) -> Touched | None:
        """The session starts. May not return (hang, death) or may raise (out of memory)."""
        return None

    def drag(self, work: WorkLike, seconds: float) -> Touched | None:
        """The session was waited for, or ended, `seconds` after it began or was last waited for."""
        return None

    def before(self, call: Call, index: int) -> Touched | None:
        """Struck call number `index` is about to run: change `call.args`, wait, or raise. None: let it pass after all."""
        return None

    def after(self, call: Call, result: torch.Tensor, index: int) -> Touched | None:
        """Struck call number `index` has run: spoil `result`, its first tensor, in place. None: let it pass after all."""
        return None

    def passed(self, call: Call, result: torch.Tensor) -> None:
        """A call that this fault counted and did not strike: its right `result`, for faults that remember."""

    def _rate(self, step: int) -> float:
        """Rises in a straight line from the onset over `ramp_steps`, as a chip that ages."""
        spec = self.spec
        if not spec.ramp_steps:
            return spec.rate
        return spec.rate * min(1.0, (step - spec.onset_step + 1) / spec.ramp_steps)


class _Session:
    """Counts matched calls and draws their fates a thousand at a time (one draw alone costs more than a small matmul)."""

    __slots__ = ("_fates", "index", "key", "rate")

    def __init__(self, key: int, rate: float) -> None:
        self.key = key
        self.rate = rate
        self.index = -1
        self._fates: Any = None

    def next(self) -> int | None:
        self.index += 1
        if self.rate >= 1.0:
            return self.index
        place = self.index % CHUNK
        if place == 0:
            self._fates = draws.uniform(self.key, (CHUNK,), start=self.index) < self.rate
        return self.index if self._fates[place] else None
