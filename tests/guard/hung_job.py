"""A job of many ranks on paper, which hangs over a planted fault, and the Flight Recorder dumps that it leaves. For test_blame_worlds.

Every rank has a host that issues operations in its program's order and runs some way ahead, and a chip that does them: a collective when
the one before it is done and what it needs has been received, a message on a stream of its own. A collective ends when all members' chips
are in it; a broadcast's root ends alone. Actions come in random order until nothing can move.

    host      the process stops (a lock, a signal): nothing more is issued; the chip does what it has
    chip      the chip stops, and the recorder notes no completion from a little earlier on
    inside    the chip stops in the middle of a collective, which a few of its peers still finish
    sleep     the chip does not begin its next operation; the host goes on
    dead      the process is gone: neither host nor chip, and no dump
    other     one operation of another kind, or of another size
    skipped   one collective is left out
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KINDS = ("host", "chip", "inside", "sleep", "dead", "other", "skipped")


@dataclass
class Op:
    kind: str
    group: str
    sequence: int = 0
    partner: int = -1
    needs: list[Op] = field(default_factory=list)
    size: int = 64
    issued: bool = False
    started: bool = False
    done: bool = False
    noted: bool = False


class Job:
    """`shape` (tensor, pipeline, data) ranks; `timing`: the recorder tells what the chips have begun."""

    def __init__(self, rng: random.Random, shape: tuple[int, int, int], *, timing: bool) -> None:
        self.rng, self.timing = rng, timing
        tensor, pipeline, data = shape
        self.world = tensor * pipeline * data
        self.prefetch, self.ahead = rng.random() < 0.5, rng.choice((6, 12, 30))
        self.groups: dict[str, list[int]] = {"0": list(range(self.world))}
        self.of: list[dict[str, str]] = [{"world": "0"} for _ in range(self.world)]
        place = {
            (t, p, d): t + tensor * (d + data * p)
            for t in range(tensor)
            for p in range(pipeline)
            for d in range(data)
        }
        for what, axis in (("data", 2), ("tensor", 0), ("pipe", 1), ("stage", 3)):
            lines: dict[Any, list[int]] = {}
            for at, rank in place.items():
                key = at[1] if axis == 3 else tuple(x for i, x in enumerate(at) if i != axis)
                lines.setdefault(key, []).append(rank)
            for line in lines.values():
                name = str(len(self.groups))
                self.groups[name] = sorted(line)
                for rank in line:
                    self.of[rank][what] = name
        self.programs = [list(self._program(rank)) for rank in range(self.world)]
        for rank in range(self.world):
            self._number(rank)
        self.host_stopped: set[int] = set()
        self.chip_stopped: dict[int, int] = {}
        self.lost: set[int] = set()
        self.stale: set[int] = set()

    def _program(self, rank: int) -> Iterator[Op]:
        """Some steps of a pipeline: forward and backward of each micro-batch, then the gradients' sum and one number of all."""
        groups = self.of[rank]
        pipe = self.groups[groups["pipe"]]
        at = pipe.index(rank)
        before, after = pipe[at - 1] if at else -1, pipe[at + 1] if at + 1 < len(pipe) else -1
        for _ in range(3):
            for _ in range(3):
                for source, target in ((before, after), (after, before)):
                    if source >= 0:
                        yield Op("recv", groups["pipe"], partner=source)
                    yield Op("broadcast", groups["tensor"])
                    for _ in range(2):
                        yield Op("_all_gather_base", groups["tensor"])
                        yield Op("all_to_all", groups["stage"])
                        yield Op("_reduce_scatter_base", groups["tensor"])
                    if target >= 0:
                        yield Op("send", groups["pipe"], partner=target)
            yield Op("all_reduce", groups["data"])
            yield Op("all_reduce", groups["world"], size=1)
            yield Op("wait", "")

    def _number(self, rank: int) -> None:
        """Sequence numbers, and what each operation needs of the rank's own; then receives may be posted a little earlier."""
        counts: dict[str, int] = {}
        program = self.programs[rank]
        last: list[Op] = []
        for op in program:
            if op.kind == "wait":
                continue
            key = op.group if op.partner < 0 else f"{op.kind}{op.partner}"
            op.sequence = counts[key] = counts.get(key, 0) + 1
            if op.kind == "recv":
                last = [*last, op]
            elif op.kind == "send":
                op.needs = list(last)
            else:
                op.needs, last = last, [op]
        if self.prefetch:
            for op in [op for op in program if op.kind == "recv"]:
                at = program.index(op)
                to = at
                while to > at - 4 and program[to - 1].kind not in ("wait", "recv") and to > 0:
                    to -= 1
                program.insert(to, program.pop(at))

    # ---- running

    def run(self, kind: str, guilty: list[int]) -> None:
        """Until nothing moves; the fault comes after some random time."""
        onset = self.rng.randrange(self.world * 20, self.world * 90)
        moves = 0
        while True:
            todo = list(range(self.world))
            self.rng.shuffle(todo)
            if not any([self._turn(rank) for rank in todo]):
                break
            moves += self.world
            if moves >= onset:
                onset = 10**9
                for rank in guilty:
                    self._strike(kind, rank)

    def _strike(self, kind: str, rank: int) -> None:
        program = self.programs[rank]
        ahead = [at for at, op in enumerate(program) if not op.issued and op.group]
        started = [at for at, op in enumerate(program) if op.started]
        if kind in ("host", "dead"):
            self.host_stopped.add(rank)
        if kind in ("chip", "sleep", "inside", "dead"):
            self.chip_stopped[rank] = max(started, default=-1)
        if kind == "dead":
            self.lost.add(rank)
        if kind == "chip":
            self.stale.add(rank)
            recent = [op for op in program if op.done and op.partner < 0][-self.rng.randrange(3, 9):]  # fmt: skip
            for op in recent:
                op.noted = False
        collectives = [at for at in ahead if program[at].partner < 0 and len(self.groups[program[at].group]) > 2]  # fmt: skip
        if kind in ("other", "skipped") and collectives:
            at = collectives[self.rng.randrange(min(4, len(collectives)))]
            if kind == "other" and self.rng.random() < 0.5 and program[at].kind != "all_to_all":
                program[at].size += 16
            elif kind == "other":
                program[at].kind = "reduce"
            else:
                group = program[at].group
                program[at].kind, program[at].group = "wait", ""
                for op in program[at:]:
                    op.sequence -= op.group == group and op.partner < 0

    def _turn(self, rank: int) -> bool:
        return self._issue(rank) | self._begin(rank) | self._end(rank)

    def _issue(self, rank: int) -> bool:
        program = self.programs[rank]
        at = next((at for at, op in enumerate(program) if not op.issued), None)
        if at is None or rank in self.host_stopped:
            return False
        behind = sum(op.issued and not op.done for op in program[:at])
        if (program[at].kind == "wait" and behind) or behind >= self.ahead:
            return False
        program[at].issued = True
        if program[at].kind == "wait":
            program[at].started = program[at].done = True
        return True

    def _begin(self, rank: int) -> bool:
        moved = False
        for at, op in enumerate(self.programs[rank]):
            if op.issued and not op.started:
                if rank in self.chip_stopped and at > self.chip_stopped[rank]:
                    continue
                if all(need.done for need in op.needs):
                    op.started = moved = True
        return moved

    def _end(self, rank: int) -> bool:
        moved = False
        for op in self.programs[rank]:
            if op.started and not op.done and self._complete(rank, op):
                op.done, moved = True, True
                op.noted = rank not in self.stale
        return moved

    def _complete(self, rank: int, op: Op) -> bool:
        if op.partner >= 0:
            other = "recv" if op.kind == "send" else "send"
            return any(
                one.kind == other and one.partner == rank and one.sequence == op.sequence and one.started
                for one in self.programs[op.partner]
            )  # fmt: skip
        if op.kind == "broadcast" and rank == self.groups[op.group][0]:
            return True
        for other in self.groups[op.group]:
            same = [o for o in self.programs[other] if o.group == op.group and o.partner < 0 and o.sequence == op.sequence]  # fmt: skip
            if not same or not same[0].started or (same[0].kind, same[0].size) != (op.kind, op.size):  # fmt: skip
                return False
        return True

    def break_inside(self, rank: int) -> None:
        """What the struck chip stands in, a few peers finish all the same, and go on to wait in what follows."""
        first = next((op for op in self.programs[rank] if op.issued and not op.done and op.partner < 0), None)  # fmt: skip
        if first is None:
            return
        for other in self.groups[first.group]:
            for op in self.programs[other]:
                same = op.group == first.group and op.partner < 0 and op.sequence == first.sequence
                if other != rank and same and op.started and self.rng.random() < 0.4:
                    op.done = op.noted = True

    # ---- its dumps

    def dumps(self, *, status: bool, whole: bool) -> dict[int, dict[str, Any]]:
        return {rank: self._dump(rank, status, whole) for rank in range(self.world) if rank not in self.lost}  # fmt: skip

    def _dump(self, rank: int, status: bool, whole: bool) -> dict[str, Any]:
        mine = [name for name, members in self.groups.items() if rank in members]
        entries = []
        for at, op in enumerate(self.programs[rank]):
            if not op.issued or not op.group or (op.noted and not whole):
                continue
            members = self.groups[op.group]
            here, message = members.index(rank), op.partner >= 0
            arrow = f" {here}{'->' if op.kind == 'send' else '<-'}{members.index(op.partner)}" if message else ""  # fmt: skip
            state = "completed" if op.noted else "started" if self.timing and op.started else "scheduled"  # fmt: skip
            entries.append(
                {"record_id": at, "pg_id": mine.index(op.group), "process_group": [op.group, self._purpose(op.group)],
                 "collective_seq_id": 3 if message else op.sequence, "p2p_seq_id": op.sequence if message else 0,
                 "profiling_name": f"nccl:{op.kind}{arrow}", "input_sizes": [[op.size, 4]], "input_dtypes": ["BFloat16"],
                 "state": state, "is_p2p": message}
            )  # fmt: skip
        dump: dict[str, Any] = {
            "version": "2.9",
            "pg_config": {
                name: {"name": name, "desc": self._purpose(name), "ranks": str(self.groups[name])}
                for name in mine
            },
            "entries": entries,
        }
        if status:
            dump["pg_status"] = {str(at): self._counts(rank, name) for at, name in enumerate(mine)}
        return dump

    def _counts(self, rank: int, name: str) -> dict[str, int]:
        ops = [op for op in self.programs[rank] if op.group == name and op.issued]
        return {
            "last_enqueued_collective": max((op.sequence for op in ops), default=-1),
            "last_started_collective": -1,
            "last_completed_collective": max((op.sequence for op in ops if op.noted), default=-1),
        }

    def _purpose(self, name: str) -> str:
        return next(what for one in self.of for what, group in one.items() if group == name)
