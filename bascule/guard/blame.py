"""Which rank held the others up? Read from the dumps that PyTorch's Flight Recorder leaves when a job of many ranks hangs. No torch.

Every collective has a sequence number in its group, and all members issue the same sequence. So three things can be said:

    stopped inside    a rank has not finished a collective that its peers have: its chip stopped working
    never arrived     peers wait in a collective that this rank never issued, and it waits for nothing itself: its process stopped
    gave no dump      the others name it as a member, and it left nothing: it is dead or unreachable

A rank that is behind but waits in another group is a victim: whoever it waits for comes into question instead. Ranks in that
position are never named; where nothing tells the ranks apart, nobody is.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bascule.errors import UsageError

CLEAR_LAG = 2
"""Finished collectives behind the peers that cannot be the skew between the moments of two dumps."""


@dataclass(frozen=True)
class Blame:
    """`confidence` from 0 to 1: 0.9 proof in the dumps, 0.6 by absence, 0.3 a lead, 0.0 nobody named."""

    guilty_ranks: tuple[int, ...]
    reason: str
    confidence: float
    evidence: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "guilty_ranks": list(self.guilty_ranks),
            "reason": self.reason,
            "confidence": self.confidence,
            "evidence": list(self.evidence),
        }


Group = tuple[str, tuple[int, ...]]
"""(what the group is for, its ranks): the numbers that ranks give their groups differ from rank to rank."""


@dataclass
class Progress:
    """How far one rank got in one group: the last collective it issued and the last it finished."""

    issued: int
    finished: int
    operations: dict[int, str] = field(default_factory=dict)


@dataclass
class Rank:
    """One rank's dump: progress by group, and the ranks it exchanges messages with that have not gone through."""

    number: int
    progress: dict[Group, Progress] = field(default_factory=dict)
    messages: set[int] = field(default_factory=set)
    message_groups: set[Group] = field(default_factory=set)

    @property
    def waits(self) -> bool:
        return bool(self.messages) or any(p.issued > p.finished for p in self.progress.values())


def blame(folder: Path, *, died_first: int | None = None) -> Blame:
    """Read all dumps in `folder` and name the guilty ranks. Raises UsageError when there are none to read.

    `died_first`: a rank that its launcher saw dead while all others lived. That comes before what dumps tell: its peers fail in its
    wake, some before they can leave a dump, and look like the dead.
    """
    if died_first is not None:
        told = f"rank {died_first} died while its peers lived"
        return Blame((died_first,), "died before its peers", 0.9, (told,))
    return judge(read_dumps(folder))


def judge(ranks: Mapping[int, Rank]) -> Blame:
    members = {number for rank in ranks.values() for _, group in rank.progress for number in group}
    silent = sorted(members - ranks.keys())
    stopped, weak = _stopped_inside(ranks)
    absent = _never_arrived(ranks)
    odd = _different_operation(ranks)
    if stopped or absent:
        evidence = [
            *stopped.values(),
            *absent.values(),
            *(f"rank {number} left no dump" for number in silent),
        ]
        kinds = [
            word
            for found, word in (
                (stopped, "stopped inside a collective that its peers finished"),
                (absent, "never issued a collective that its peers wait in"),
            )
            if found
        ]
        return Blame(
            tuple(sorted({*stopped, *absent, *silent})), " / ".join(kinds), 0.9, tuple(evidence)
        )
    if odd:
        return Blame(
            tuple(sorted(odd)),
            "issued another operation than its peers under the same number",
            0.9,
            tuple(odd.values()),
        )
    if silent:
        told = tuple(
            f"rank {number} is a member of groups that wait, and left no dump" for number in silent
        )
        return Blame(tuple(silent), "gave no dump: dead or unreachable", 0.6, told)
    if weak:
        return Blame(
            tuple(sorted(weak)), "one collective behind its peers", 0.3, tuple(weak.values())
        )
    return Blame((), "no rank differs from its peers in these dumps", 0.0)


def _stopped_inside(ranks: Mapping[int, Rank]) -> tuple[dict[int, str], dict[int, str]]:
    """Ranks that issued a collective which peers finished and they did not: (clear cases, cases within the dumps' skew)."""
    clear: dict[int, str] = {}
    weak: dict[int, str] = {}
    for (name, group), by_rank in _by_group(ranks).items():
        furthest = max(progress.finished for progress in by_rank.values())
        for number, progress in by_rank.items():
            behind = furthest - progress.finished
            if behind <= 0 or progress.issued <= progress.finished:
                continue
            told = f"rank {number} finished {name} {list(group)} up to {progress.finished}, its peers up to {furthest}"
            (clear if behind >= CLEAR_LAG else weak)[number] = told
    return clear, weak


def _never_arrived(ranks: Mapping[int, Rank]) -> dict[int, str]:
    """Ranks that somebody waits for and that wait for nobody."""
    found: dict[int, str] = {}
    idle = {number for number, rank in ranks.items() if not rank.waits}
    for (name, group), by_rank in _by_group(ranks).items():
        waiting = {number: p.finished + 1 for number, p in by_rank.items() if p.issued > p.finished}
        for number in idle & by_rank.keys():
            late = [other for other, wanted in waiting.items() if wanted > by_rank[number].issued]
            if late:
                found.setdefault(
                    number,
                    f"rank {number} issued {name} {list(group)} up to {by_rank[number].issued}; {len(late)} peers wait in the next",
                )
    for number, rank in ranks.items():
        for other in rank.messages & idle:
            found.setdefault(
                other,
                f"rank {number} waits for a message to or from rank {other}, which waits for nothing",
            )
    return found


def _different_operation(ranks: Mapping[int, Rank]) -> dict[int, str]:
    """Ranks whose operation under one number is not what most of the group issued under it."""
    found: dict[int, str] = {}
    for (name, group), by_rank in _by_group(ranks).items():
        for number in set().union(*(progress.operations for progress in by_rank.values())):
            asked = {
                rank: progress.operations[number]
                for rank, progress in by_rank.items()
                if number in progress.operations
            }
            common = max(sorted(set(asked.values())), key=list(asked.values()).count)
            if 2 * list(asked.values()).count(common) <= len(asked):
                continue  # no majority, no culprit
            for rank, operation in asked.items():
                if operation != common:
                    found.setdefault(
                        rank,
                        f"rank {rank} issued {operation} as number {number} of {name} {list(group)}, its peers {common}",
                    )
    return found


def _by_group(ranks: Mapping[int, Rank]) -> dict[Group, dict[int, Progress]]:
    groups: dict[Group, dict[int, Progress]] = {}
    for rank in ranks.values():
        for group, progress in rank.progress.items():
            groups.setdefault(group, {})[rank.number] = progress
    return groups


# --- reading --------------------------------------------------------------------------------------------------------------


class _Plain(pickle.Unpickler):
    """Builds containers, numbers and text. A dump needs no classes, and a pickle that asks for one may run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which a Flight Recorder dump never needs"
        )


def read_dumps(folder: Path) -> dict[int, Rank]:
    """Every file whose name ends in a number (before a suffix) is that rank's dump, JSON or pickle."""
    if not folder.is_dir():
        raise UsageError(
            f"'{folder}' is not a folder. Give the folder that holds one Flight Recorder dump per rank."
        )
    ranks: dict[int, Rank] = {}
    for path in sorted(folder.iterdir()):
        found = re.search(r"(\d+)(\.\w+)?$", path.name)
        if path.is_file() and found:
            ranks[int(found.group(1))] = _rank(int(found.group(1)), _load(path))
    _drop_message_groups(ranks)
    if not ranks:
        raise UsageError(
            f"'{folder}' holds no dumps: no file name there ends in a rank, as rank_0.json or trace_0 do."
        )
    return ranks


def _load(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        value = json.loads(data) if data.lstrip()[:1] == b"{" else _Plain(io.BytesIO(data)).load()
    except (
        ValueError,
        pickle.UnpicklingError,
        EOFError,
        IndexError,
        KeyError,
        AttributeError,
    ) as error:
        raise UsageError(
            f"'{path}' is not a Flight Recorder dump: {error}. Remove it or dump that rank again."
        ) from None
    if not isinstance(value, dict):
        raise UsageError(
            f"'{path}' is not a Flight Recorder dump: it holds a {type(value).__name__}, not a table."
        )
    return value


def _rank(number: int, dump: Mapping[str, Any]) -> Rank:
    rank = Rank(number)
    names = dump.get("pg_config") or {}
    entries: Sequence[Mapping[str, Any]] = dump.get("entries") or ()
    by_local_id: dict[str, Group] = {}
    for entry in entries:
        group = _group(entry, names)
        by_local_id[str(entry.get("pg_id"))] = group
        if entry.get("is_p2p"):
            rank.messages |= _partners(entry, group, number)
            rank.message_groups.add(group)
        else:
            _note(rank.progress.setdefault(group, Progress(-1, -1)), entry)
    _add_status(rank, dump.get("pg_status") or {}, by_local_id, names)
    return rank


def _drop_message_groups(ranks: Mapping[int, Rank]) -> None:
    """Where ranks exchange messages in pairs, their counters run apart by nature and compare with nothing."""
    used = {group for rank in ranks.values() for group in rank.message_groups}
    for rank in ranks.values():
        for group in used & rank.progress.keys():
            del rank.progress[group]


def _group(entry: Mapping[str, Any], names: Mapping[str, Any]) -> Group:
    name, purpose = [*entry.get("process_group", ("0", "")), ""][:2]
    # gloo lists the group of all ranks under an empty name.
    return str(purpose or name), _members(names.get(str(name)) or names.get("") or {})


def _members(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`ranks` is a list, or its text "[0, 2]"; PyTorch leaves it empty for the group of all ranks in some versions."""
    return tuple(int(number) for number in re.findall(r"\d+", str(config.get("ranks", ""))))


def _partners(entry: Mapping[str, Any], group: Group, number: int) -> set[int]:
    """Global ranks of an unfinished message: `send 0->3` and `recv 2<-3` name places in the group."""
    if entry.get("state") == "completed":
        return set()
    places = [
        int(place)
        for place in re.findall(r"(\d+)(?:->|<-)(\d+)", str(entry.get("profiling_name", "")))
        for place in place
    ]
    members = group[1]
    return {members[place] for place in places if place < len(members)} - {number}


def _note(progress: Progress, entry: Mapping[str, Any]) -> None:
    sequence = int(entry.get("collective_seq_id", -1))
    progress.issued = max(progress.issued, sequence)
    if entry.get("state") == "completed":
        progress.finished = max(progress.finished, sequence)
    progress.operations[sequence] = _operation(entry)


def _operation(entry: Mapping[str, Any]) -> str:
    """What must be equal on all ranks: the name, and for an all-reduce also how many numbers it sums."""
    name = str(entry.get("profiling_name", "")).rpartition(":")[2]
    if name not in ("all_reduce", "allreduce"):
        return name
    sizes = entry.get("input_sizes") or ()
    return f"{name} of {sum(math.prod(size) for size in sizes)} numbers"


def _add_status(
    rank: Rank,
    status: Mapping[str, Any],
    by_local_id: Mapping[str, Group],
    names: Mapping[str, Any],
) -> None:
    """`pg_status` counts what the recorder's ring has already forgotten. It is keyed by the rank's own group numbers, which
    only entries translate; groups without entries are matched by their place in both tables where these are as long."""
    ordered = sorted(status, key=int)
    configs = sorted(names, key=lambda name: int(name) if name.isdigit() else 0)
    by_place = dict(zip(ordered, configs, strict=True)) if len(ordered) == len(configs) else {}
    for local, counts in status.items():
        group = by_local_id.get(local)
        if group is None and local in by_place:
            config = names[by_place[local]]
            group = str(config.get("desc") or by_place[local]), _members(config)
        if group is None:
            continue
        progress = rank.progress.setdefault(group, Progress(-1, -1))
        progress.issued = max(progress.issued, int(counts.get("last_enqueued_collective", -1)))
        progress.finished = max(progress.finished, int(counts.get("last_completed_collective", -1)))


def describe(found: Blame) -> Iterable[str]:
    """Lines for people."""
    who = ", ".join(str(number) for number in found.guilty_ranks) or "nobody"
    yield f"guilty: {who} (confidence {found.confidence:g}): {found.reason}"
    yield from (f"  {line}" for line in found.evidence)
