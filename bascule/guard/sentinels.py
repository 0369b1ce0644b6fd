"""Watchers of one number each, always on, nearly free. A cry is a suspicion; replays decide whose fault it is.

Each sentinel is a pure pair: `start()` gives a state, `fold(state, seen)` gives the next state and a Cry or None. States are
frozen values, so a discarded step is undone by keeping the old one. Sentinels see almost none of the silent corruption
(defects.md 5); checksums and referees are for that. They are here for what is loud, and must not cry in healthy training:
not when the phase changes, not while a fresh model's loss falls, not when one batch is harder than the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

WINDOW = 48
WARM_UP = 16


@dataclass(frozen=True)
class Seen:
    """What a step shows. `loads`: tokens per expert, one row per MoE layer. `seconds` is the time of forward and backward;
    `own_seconds` the same without what the host's scheduler gave to others, and `watched` says what the guard did meanwhile: only
    steps that were watched alike are compared by time. `layers`: gradient norm of each layer, in the order of the model."""

    step: int
    phase: str
    loss: float
    grad_norm: float
    seconds: float
    tokens: int
    loads: Sequence[Sequence[float]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: float | None = None
    own_seconds: float = 0.0
    watched: str = ""
    layers: Sequence[float] = ()
    layer_names: Sequence[str] = ()


@dataclass(frozen=True)
class Cry:
    """A sentinel's alarm. `suspect`: the step may be corrupt, so replay it; otherwise it is a warning about the run."""

    sentinel: str
    measured: float | None
    bound: float | None
    detail: str
    suspect: bool = True


class Sentinel(Protocol):
    """`fold` must not change `state`. A state is JSON-free and private to its sentinel."""

    name: str

    def start(self) -> Any: ...

    def fold(self, state: Any, seen: Seen) -> tuple[Any, Cry | None]: ...


class Finite:
    """Loss and gradient norm are numbers, and there is a gradient. One NaN or infinity in any gradient makes the norm one."""

    name = "finite"

    def start(self) -> None:
        return None

    def fold(self, state: None, seen: Seen) -> tuple[None, Cry | None]:
        for what, value in (("loss", seen.loss), ("gradient norm", seen.grad_norm)):
            if not math.isfinite(value):
                return None, Cry(self.name, None, None, f"the {what} is {value}")
        if seen.grad_norm == 0.0 and seen.tokens > 0 and seen.phase != "grpo":
            # Weights blown up by one wrong update: a loss like chance, and referee and chip agree on gradients of 0 for ever.
            return None, Cry(self.name, 0.0, 0.0, f"the gradient of {seen.tokens} tokens is 0")
        return None, None


@dataclass(frozen=True)
class History:
    """The last values of one phase, oldest first."""

    phase: str = ""
    values: tuple[float, ...] = ()

    def then(self, phase: str, value: float) -> History:
        if phase != self.phase:
            return History(phase, (value,))
        return History(phase, (*self.values, value)[-WINDOW:])


class Spike:
    """One number far above its recent past, by a robust z-score (median and median absolute deviation) of its logarithm or value.

    Only upward: a falling loss is what training is for. The spread has a floor (`least_spread`), because a quiet stretch
    would otherwise make any ordinary step a spike, and a value must also exceed `least_factor` times the largest of the window:
    gradients of reinforcement learning have heavy tails, and one batch in a thousand is naturally 8 sigma away.
    A phase starts a new history. Values that cried are not remembered, so a lasting jump cries until someone decides;
    `accept` tells the sentinel that the jump is real.
    """

    def __init__(
        self, name: str, read: str, sigma: float, *, least_spread: float, least_factor: float
    ) -> None:
        self.name = name
        self.read = read
        self.sigma = sigma
        self.least_spread = least_spread
        self.least_factor = least_factor

    def start(self) -> History:
        return History()

    def fold(self, state: History, seen: Seen) -> tuple[History, Cry | None]:
        value = self._value(seen)
        if value is None or not math.isfinite(value):
            return state, None
        if state.phase == seen.phase and len(state.values) >= WARM_UP:
            centre = median(state.values)
            spread = max(
                1.4826 * median([abs(v - centre) for v in state.values]),
                self.least_spread * abs(centre),
                1e-12,
            )
            z = (value - centre) / spread
            ceiling = self.least_factor * max(state.values)
            if z > self.sigma and value > ceiling:
                detail = f"{self.read} {value:.4g} lies {z:.1f} robust sigma above the last {len(state.values)} steps (median {centre:.4g})"
                return state, Cry(self.name, z, self.sigma, detail)
        return state.then(seen.phase, value), None

    def accept(self, state: History, seen: Seen) -> History:
        """The value was judged real: remember it, so that a new level stops crying after half a window."""
        value = self._value(seen)
        return state if value is None or not math.isfinite(value) else state.then(seen.phase, value)

    def _value(self, seen: Seen) -> float | None:
        if self.read == "loss" and seen.phase == "grpo":
            # A policy-gradient loss is centred on 0 and its size follows the advantages that were drawn: late in training,
            # when most groups agree, one mixed group is ten sigma. Its gradient norm is watched instead.
            return None
        if self.read in ("loss", "grad_norm"):
            value: float = getattr(seen, self.read)
            return value
        return seen.metrics.get(self.read)


@dataclass(frozen=True)
class LayerHistory:
    """The last gradient norms of one phase, one row a step with a number for each layer, oldest first; `shares`: the same over the
    norm of the whole gradient."""

    phase: str = ""
    norms: tuple[tuple[float, ...], ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()

    def then(self, seen: Seen) -> LayerHistory:
        row = tuple(seen.layers)
        share = tuple(norm / seen.grad_norm for norm in row)
        if not self.speaks_of(seen):
            return LayerHistory(seen.phase, (row,), (share,))
        return LayerHistory(
            seen.phase, (*self.norms, row)[-WINDOW:], (*self.shares, share)[-WINDOW:]
        )

    def speaks_of(self, seen: Seen) -> bool:
        return self.phase == seen.phase and all(
            len(row) == len(seen.layers) for row in self.norms[-1:]
        )


class LayerGradient:
    """One layer's gradient far above its own recent past, or its share of the whole far below: what the norm of the whole hides. A layer
    with a hundredth of the gradient may grow fifty times before the whole grows by half, and may vanish unseen.

    Up is judged by its size, down by its share: late in reinforcement learning all layers fall together. A jump of the whole is
    the gradient spike's and not told twice; a whole of 0 is `Finite`'s. Layers and not parameters: an expert may get no token in a step.
    """

    name = "layer gradient"

    def __init__(self, sigma: float, *, factor: float = 20.0, least_spread: float = 0.1) -> None:
        self.sigma = sigma
        self.factor = factor
        self.least_spread = least_spread

    def start(self) -> LayerHistory:
        return LayerHistory()

    def fold(self, state: LayerHistory, seen: Seen) -> tuple[LayerHistory, Cry | None]:
        if not seen.layers or seen.grad_norm <= 0.0 or not math.isfinite(seen.grad_norm):
            return state, None
        if state.speaks_of(seen) and len(state.norms) >= WARM_UP:
            largest = [max(past) for past in zip(*state.norms, strict=True)]
            whole = seen.grad_norm > self.factor * math.hypot(*largest)
            found = (
                None if whole else self._shrunk(state, seen) or self._grown(state, seen, largest)
            )
            if found:
                at, ratio, told = found
                layer = seen.layer_names[at] if seen.layer_names else f"layer {at}"
                detail = f"the gradient of {layer} {told} of the last {len(state.norms)} steps"
                return state, Cry(self.name, ratio, self.factor, detail)
        return state.then(seen), None

    def accept(self, state: LayerHistory, seen: Seen) -> LayerHistory:
        return state.then(seen) if seen.layers and 0.0 < seen.grad_norm < math.inf else state

    def _grown(
        self, state: LayerHistory, seen: Seen, largest: Sequence[float]
    ) -> tuple[int, float, str] | None:
        for at, (norm, most) in enumerate(zip(seen.layers, largest, strict=True)):
            if 0.0 < self.factor * most < norm and self._far(
                norm, [row[at] for row in state.norms]
            ):
                return at, norm / most, f"is {norm:.4g}, {norm / most:.3g} times the largest"
        return None

    def _far(self, norm: float, past: Sequence[float]) -> bool:
        centre = median(past)
        spread = 1.4826 * median([abs(value - centre) for value in past])
        return norm - centre > self.sigma * max(spread, self.least_spread * centre)

    def _shrunk(self, state: LayerHistory, seen: Seen) -> tuple[int, float | None, str] | None:
        for at, past in enumerate(zip(*state.shares, strict=True)):
            share, least = seen.layers[at] / seen.grad_norm, min(past)
            if self.factor * share < least:
                ratio = least / share if share else None
                return at, ratio, f"is {share:.3g} of the whole, the least {least:.3g}"
        return None


class StepTime:
    """Seconds per token far above the past for many steps in a row: a straggler, a throttled chip, work on the host.

    A warning, not a suspicion: slow is not wrong. One slow step is nothing here; a long one is `Stall`'s.
    """

    name = "step time"

    def __init__(self, *, factor: float = 3.0, in_a_row: int = 8, least_s: float = 0.02) -> None:
        self.factor = factor
        self.in_a_row = in_a_row
        self.least_s = least_s

    def start(self) -> tuple[History, int]:
        return History(), 0

    def fold(
        self, state: tuple[History, int], seen: Seen
    ) -> tuple[tuple[History, int], Cry | None]:
        history, slow = state
        if seen.tokens <= 0 or seen.seconds <= 0:
            return state, None
        pace = seen.seconds / seen.tokens
        if history.phase != seen.phase or len(history.values) < WARM_UP:
            return (history.then(seen.phase, pace), 0), None
        usual = median(history.values)
        if pace <= self.factor * usual or seen.seconds < self.least_s:
            return (history.then(seen.phase, pace), 0), None
        slow += 1
        if slow < self.in_a_row:
            return (history, slow), None
        detail = f"{slow} steps in a row took {pace / usual:.1f} times the usual {usual * 1e6:.1f} us per token"
        return (history.then(seen.phase, pace), 0), Cry(
            self.name, pace / usual, self.factor, detail, suspect=False
        )


class Stall:
    """One step that took far longer than steps like it: the chip, a link or a disk held it up. Told once, never a suspicion, so
    it condemns nobody; steps that stay slow are `StepTime`'s.

    Time in which the thread was ready and the host ran other work does not count: on a loaded machine steps of ten times the usual
    length are everyday. Nor does an excess under `least_s` (garbage collection, a page that comes from the disk), or one within the
    spread of the steps before.
    """

    name = "stall"
    warm_up = 6
    sigma = 12.0

    def __init__(self, *, factor: float = 3.0, least_s: float = 0.75) -> None:
        self.factor = factor
        self.least_s = least_s

    def start(self) -> dict[str, History]:
        return {}

    def fold(self, state: dict[str, History], seen: Seen) -> tuple[dict[str, History], Cry | None]:
        if seen.tokens <= 0 or seen.own_seconds <= 0:
            return state, None
        history = state.get(seen.watched, History())
        known = history.values if history.phase == seen.phase else ()
        then = {**state, seen.watched: history.then(seen.phase, seen.own_seconds / seen.tokens)}
        if len(known) < self.warm_up:
            return then, None
        usual = median(known) * seen.tokens
        spread = 1.4826 * median([abs(pace * seen.tokens - usual) for pace in known])
        if seen.own_seconds <= max(self.factor * usual, usual + max(self.least_s, self.sigma * spread)):  # fmt: skip
            return then, None
        detail = (
            f"one step took {seen.own_seconds:.2f} s where such steps take {usual:.2f} s, without what the host's scheduler withheld: "
            "the chip, its link or its disk held it up"
        )
        return then, Cry(self.name, seen.own_seconds / usual, self.factor, detail, suspect=False)


class ExpertCollapse:
    """One expert of a layer gets nearly all tokens for many steps: the router has collapsed.

    `share` is of the layer's assignments; with k experts per token no expert can hold more than 1/k of them, so the bound is
    a share of that ceiling.
    """

    name = "expert collapse"

    def __init__(
        self, *, experts_per_token: int = 1, share: float = 0.95, in_a_row: int = 20
    ) -> None:
        self.experts_per_token = experts_per_token
        self.share = share
        self.in_a_row = in_a_row

    def start(self) -> tuple[int, ...]:
        return ()

    def fold(self, state: tuple[int, ...], seen: Seen) -> tuple[tuple[int, ...], Cry | None]:
        shares = [
            self.experts_per_token * max(row) / sum(row) if sum(row) > 0 and len(row) > 1 else 0.0
            for row in seen.loads
        ]
        before = state if len(state) == len(shares) else (0,) * len(shares)
        runs = tuple(
            run + 1 if share > self.share else 0 for run, share in zip(before, shares, strict=True)
        )
        worst = max(range(len(runs)), key=lambda layer: runs[layer], default=0)
        if runs and runs[worst] == self.in_a_row:
            detail = f"MoE layer {worst}: one expert got {shares[worst]:.0%} of what it can get for {runs[worst]} steps"
            return runs, Cry(self.name, shares[worst], self.share, detail, suspect=False)
        return runs, None


class MemoryTrend:
    """Memory that only grows: a leak. Cries once when it rose at every one of `in_a_row` steps and by `least_share` in all."""

    name = "memory trend"

    def __init__(self, *, in_a_row: int = 12, least_share: float = 0.1) -> None:
        self.in_a_row = in_a_row
        self.least_share = least_share

    def start(self) -> tuple[float, ...]:
        return ()

    def fold(self, state: tuple[float, ...], seen: Seen) -> tuple[tuple[float, ...], Cry | None]:
        if seen.memory_bytes is None:
            return state, None
        if not state or seen.memory_bytes <= state[-1]:
            return (seen.memory_bytes,), None
        rising = (*state, seen.memory_bytes)
        growth = rising[-1] / max(rising[0], 1.0) - 1.0
        if len(rising) <= self.in_a_row or growth < self.least_share:
            return rising, None
        detail = f"memory grew at each of the last {len(rising) - 1} steps, by {growth:.0%} to {rising[-1] / 2**20:.0f} MiB"
        return (seen.memory_bytes,), Cry(self.name, growth, self.least_share, detail, suspect=False)


def standard(spike_sigma: float, *, experts_per_token: int = 1) -> tuple[Sentinel, ...]:
    """The sentinels of a run. Factors: see docs/guard.md for the runs they were tried on."""
    return (
        Finite(),
        Spike("loss spike", "loss", spike_sigma, least_spread=0.05, least_factor=2.0),
        Spike("gradient spike", "grad_norm", spike_sigma, least_spread=0.1, least_factor=20.0),
        LayerGradient(spike_sigma),
        StepTime(),
        Stall(),
        ExpertCollapse(experts_per_token=experts_per_token),
        MemoryTrend(),
    )


@dataclass(frozen=True)
class Watch:
    """All sentinels with their states. `fold` returns the next Watch; keep the old one to undo a discarded step."""

    sentinels: tuple[Sentinel, ...]
    states: tuple[Any, ...]

    @classmethod
    def begin(cls, sentinels: tuple[Sentinel, ...]) -> Watch:
        return cls(sentinels, tuple(sentinel.start() for sentinel in sentinels))

    def fold(self, seen: Seen) -> tuple[Watch, list[Cry]]:
        pairs = [
            sentinel.fold(state, seen)
            for sentinel, state in zip(self.sentinels, self.states, strict=True)
        ]
        return replace(self, states=tuple(state for state, _ in pairs)), [
            cry for _, cry in pairs if cry is not None
        ]

    def accept(self, seen: Seen) -> Watch:
        """The step was cleared by replays: spikes learn its values."""
        states = [
            sentinel.accept(state, seen) if isinstance(sentinel, Spike | LayerGradient) else state
            for sentinel, state in zip(self.sentinels, self.states, strict=True)
        ]
        return replace(self, states=tuple(states))


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else 0.5 * (ordered[middle - 1] + ordered[middle])
