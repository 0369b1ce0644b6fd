"""A pipeline schedule played event by event over its stages, for stages that need not be equal.

Operations: F forward, B backward for the inputs, W backward for the weights (inside B for schedules that do not split it). Stage
c of p * v sits on device c mod p. One device does one thing at a time; F(c) waits for F(c-1), B(c) for B(c+1), W for its B.
Only the start and the end are played where there are many micro-batches: in between each one adds the slowest device's time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from bascule.errors import RecipeError, nearest

SCHEDULES = ("1f1b", "interleaved", "zb", "dualpipe")
Operation = tuple[str, int, int]  # kind, stage, micro-batch


@dataclass(frozen=True)
class Stage:
    """Seconds of one micro-batch in one (virtual) stage. `transfer`: seconds to hand its result to the neighbour."""

    forward: float
    backward: float
    weight: float
    transfer: float = 0.0


@dataclass(frozen=True)
class Played:
    """Length of the step's pipeline in seconds, the busy seconds of each device, and events (device, kind, stage, micro-batch, start, end)."""

    seconds: float
    busy: tuple[float, ...]
    events: tuple[tuple[int, str, int, int, float, float], ...]

    @property
    def bubble(self) -> float:
        """Idle share of the slowest device's time over its busy time."""
        return self.seconds / max(self.busy) - 1


def play(stages: Sequence[Stage], devices: int, micro_batches: int, schedule: str) -> Played:
    """Play one step. `stages` has devices * virtual entries. Raises RecipeError for an unknown schedule or an uneven split."""
    if schedule not in SCHEDULES:
        raise RecipeError(
            f"'{schedule}' is not a pipeline schedule; allowed: {', '.join(SCHEDULES)}.{nearest(schedule, SCHEDULES)}"
        )
    if len(stages) % devices:
        raise RecipeError(
            f"{len(stages)} stages cannot be spread over {devices} pipeline devices: give a multiple."
        )
    played = (
        micro_batches if micro_batches <= 6 * devices else 5 * devices + micro_batches % devices
    )
    events = _run(stages, devices, played, schedule)
    per_device = [
        sum(s.forward + s.backward + s.weight for s in _hosted(stages, devices, d, schedule))
        for d in range(devices)
    ]
    left = micro_batches - played
    seconds = max(event[5] for event in events) + left * max(per_device)
    return Played(seconds, tuple(micro_batches * one for one in per_device), tuple(events))


def _hosted(stages: Sequence[Stage], devices: int, device: int, schedule: str) -> list[Stage]:
    """Stages whose work falls on a device; under DualPipe it does half of its own and half of its mirror's."""
    own = [stage for index, stage in enumerate(stages) if index % devices == device]
    if schedule != "dualpipe":
        return own
    mirror = [
        stage for index, stage in enumerate(stages) if index % devices == devices - 1 - device
    ]
    return [
        Stage((a.forward + b.forward) / 2, (a.backward + b.backward) / 2, (a.weight + b.weight) / 2)
        for a, b in zip(own, mirror, strict=True)
    ]


def _run(
    stages: Sequence[Stage], devices: int, micro_batches: int, schedule: str
) -> list[tuple[int, str, int, int, float, float]]:
    """List scheduling: the device that can start first takes its most urgent operation that is ready."""
    board = _Board(stages, devices, micro_batches, schedule)
    queue = [(0.0, device) for device in range(devices)]
    heapq.heapify(queue)
    asleep: set[int] = set()
    while queue:
        now, device = heapq.heappop(queue)
        chosen = board.choose(device, now)
        if chosen is not None:
            end = board.start(chosen, device, now)
            heapq.heappush(queue, (end, device))
            for waiting in sorted(asleep):
                heapq.heappush(queue, (end, waiting))
            asleep.clear()
        elif (later := board.next_ready(device, now)) is not None:
            heapq.heappush(queue, (later, device))
        elif board.unfinished(device):
            asleep.add(device)
    return board.events


def interleaved_order(
    devices: int, virtual: int, micro_batches: int, device: int
) -> list[Operation]:
    """Megatron-LM's order on one device: groups of `devices` micro-batches walk the chunks; after the warm-up one forward,
    one backward in turn."""

    def walk(kind: str, chunks: Sequence[int]) -> list[Operation]:
        return [
            (kind, chunk * devices + device, micro)
            for first in range(0, micro_batches, devices)
            for chunk in chunks
            for micro in range(first, min(first + devices, micro_batches))
        ]

    forward, backward = walk("F", range(virtual)), walk("B", range(virtual - 1, -1, -1))
    ahead = min(len(forward), 2 * (devices - device - 1) + (virtual - 1) * devices)
    pairs = [op for pair in zip(forward[ahead:], backward, strict=False) for op in pair]
    return forward[:ahead] + pairs + backward[len(forward) - ahead :]


class _Board:
    """Which operations are ready when, and what each device should do next."""

    def __init__(
        self, stages: Sequence[Stage], devices: int, micro_batches: int, schedule: str
    ) -> None:
        self.stages, self.devices, self.schedule = stages, devices, schedule
        self.virtual = len(stages) // devices
        self.split = schedule in ("zb", "dualpipe")
        self.ready: list[dict[Operation, float]] = [{} for _ in range(devices)]
        self.left = [0] * devices
        self.flying: list[dict[int, int]] = [{0: 0, 1: 0} for _ in range(devices)]
        self.order = (
            [interleaved_order(devices, self.virtual, micro_batches, d) for d in range(devices)]
            if schedule == "interleaved"
            else []
        )
        self.events: list[tuple[int, str, int, int, float, float]] = []
        self.micro_batches = micro_batches
        for micro in range(micro_batches):
            self._offer(("F", 0, micro), 0.0)
            for stage in range(len(stages)):
                self.left[self.home(stage, micro)] += 3 if self.split else 2

    def home(self, stage: int, micro: int) -> int:
        """Device of a stage; odd micro-batches run through DualPipe's mirror image."""
        device = stage % self.devices
        return self.devices - 1 - device if self.schedule == "dualpipe" and micro % 2 else device

    def stream(self, micro: int) -> int:
        return micro % 2 if self.schedule == "dualpipe" else 0

    def room(self, device: int, micro: int) -> bool:
        """May a device take one more forward pass of this stream? As many may be unanswered as 1F1B keeps at that depth, for
        DualPipe in each direction (devices + 1 together)."""
        stream = self.stream(micro)
        return self.flying[device][stream] < (device + 1 if stream else self.devices - device)

    def choose(self, device: int, now: float) -> Operation | None:
        if self.order:
            line = self.order[device]
            ready = bool(line) and self.ready[device].get(line[0], now + 1.0) <= now + 1e-12
            return line[0] if ready else None
        open_now = [op for op, when in self.ready[device].items() if when <= now + 1e-12]
        backward = [op for op in open_now if op[0] == "B"]
        forward = [op for op in open_now if op[0] == "F" and self.room(device, op[2])]
        weights = [op for op in open_now if op[0] == "W"]
        for group in (backward, forward, weights):
            if group:
                return min(group, key=lambda op: op[2])
        return None

    def next_ready(self, device: int, now: float) -> float | None:
        ready = list(self.ready[device].items())
        if self.order:
            ready = [(op, when) for op, when in ready if self.order[device][:1] == [op]]
        times = [
            when
            for op, when in ready
            if when > now + 1e-12 and (self.order or op[0] != "F" or self.room(device, op[2]))
        ]
        return min(times) if times else None

    def unfinished(self, device: int) -> bool:
        return self.left[device] > 0

    def start(self, op: Operation, device: int, now: float) -> float:
        kind, stage, micro = op
        del self.ready[device][op]
        if self.order:
            self.order[device].pop(0)
        self.left[device] -= 1
        one = self.stages[stage]
        cost = {
            "F": one.forward,
            "B": one.backward + (0.0 if self.split else one.weight),
            "W": one.weight,
        }[kind]
        end = now + cost
        self.events.append((device, kind, stage, micro, now, end))
        if kind == "F":
            self.flying[device][self.stream(micro)] += 1
            last = stage == len(self.stages) - 1
            self._offer(
                ("B", stage, micro) if last else ("F", stage + 1, micro),
                end + (0.0 if last else one.transfer),
            )
        elif kind == "B":
            self.flying[device][self.stream(micro)] -= 1
            if stage:
                self._offer(("B", stage - 1, micro), end + one.transfer)
            if self.split:
                self._offer(("W", stage, micro), end)
        return end

    def _offer(self, op: Operation, when: float) -> None:
        self.ready[self.home(op[1], op[2])][op] = when
