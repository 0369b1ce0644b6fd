"""What a rank was doing when its job hung: PyTorch's Flight Recorder dumps, JSON or pickle, read into progress by group. No torch.

Dumps differ by version and backend: `pg_status` or none, groups with their ranks or without, a ring that forgot the beginning, only what
is unfinished or everything. What is not there is not guessed: a count that no entry and no status gives stays unknown.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bascule.errors import UsageError

Group = tuple[str, tuple[int, ...]]
"""(what the group is for, its ranks): the numbers that ranks give their groups differ from rank to rank."""

NOBODY = -1

EVEN = ("all_reduce", "allreduce", "_all_gather_base", "_allgather_base", "_reduce_scatter_base", "broadcast")  # fmt: skip
"""Every rank hands in as many numbers, of one type. Not so all_to_all, and gathers of lists."""


@dataclass
class Progress:
    """How far one rank got in one group: the last collective it issued and the last it finished."""

    issued: int
    finished: int
    operations: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pending:
    """One operation that was issued and has not finished. `partner`: the other end of a message, a global rank; None for a
    collective, NOBODY where the dump does not tell (a batch of messages under one name)."""

    order: int
    group: Group
    sequence: int
    operation: str
    started: bool
    partner: int | None = None


@dataclass
class Rank:
    """One rank's dump. `pending` in the order of issue."""

    number: int
    progress: dict[Group, Progress] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)
    groups: set[Group] = field(default_factory=set)

    @property
    def waits(self) -> bool:
        return bool(self.pending) or any(p.issued > p.finished for p in self.progress.values())

    @property
    def collectives(self) -> list[Pending]:
        return [one for one in self.pending if one.partner is None]

    @property
    def messages(self) -> list[Pending]:
        return [one for one in self.pending if one.partner is not None]


class _AsksForClass(pickle.UnpicklingError):
    pass


class _Plain(pickle.Unpickler):
    """Builds containers, numbers and text. A dump needs no classes, and a pickle that asks for one may run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise _AsksForClass(
            f"it asks for {module}.{name}, which a Flight Recorder dump never needs"
        )


DAMAGE = (
    ValueError, TypeError, pickle.UnpicklingError, EOFError, LookupError, AttributeError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip
"""What reading a truncated or overwritten file can raise."""


def read_dumps(folder: Path) -> tuple[dict[int, Rank], dict[int, str]]:
    """Every file whose name ends in a number (before a suffix) is that rank's dump, JSON or pickle. (ranks, those whose file cannot
    be read and why): a rank that dies while it writes leaves half a dump. Raises UsageError when none can be read, and for a pickle
    that asks for classes, which no damage explains."""
    if not folder.is_dir():
        raise UsageError(
            f"'{folder}' is not a folder. Give the folder that holds one Flight Recorder dump per rank."
        )
    ranks: dict[int, Rank] = {}
    unreadable: dict[int, str] = {}
    for path in sorted(folder.iterdir()):
        found = re.search(r"(\d+)(\.\w+)?$", path.name)
        if not path.is_file() or not found:
            continue
        number = int(found.group(1))
        try:
            ranks[number] = rank_of(number, _load(path.read_bytes()))
        except _AsksForClass as error:
            raise UsageError(_refusal(path, error)) from None
        except DAMAGE as error:
            unreadable[number] = _refusal(path, error)
    if not ranks:
        raise UsageError(
            next(iter(unreadable.values()), None)
            or f"'{folder}' holds no dumps: no file name there ends in a rank, as rank_0.json or trace_0 do."
        )
    return ranks, unreadable


def _refusal(path: Path, error: BaseException) -> str:
    told = str(error) if isinstance(error, _NoDump | _AsksForClass) else f"a record in it is not as the recorder writes it ({type(error).__name__})"  # fmt: skip
    return (
        f"'{path}' is not a Flight Recorder dump: {told}. Asked for is the file that PyTorch's recorder leaves for each rank, a pickle, or its "
        "JSON. Remove this one or dump that rank again."
    )


class _NoDump(ValueError):
    """In words for people what was found instead: those of pickle tell nobody anything."""


def _load(data: bytes) -> dict[str, Any]:
    if not data.strip():
        raise _NoDump("it is empty")
    value = _json(data) if data.lstrip()[:1] == b"{" else _unpickle(data)
    if not isinstance(value, dict):
        raise _NoDump(f"it holds a {type(value).__name__}, not a table")
    if not value.keys() & {"entries", "pg_config", "pg_status"}:
        raise _NoDump("it holds none of the tables entries, pg_config and pg_status")
    return value


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise _NoDump(f"it begins as JSON, which breaks off or goes wrong at line {error.lineno}, column {error.colno}") from None  # fmt: skip
    except UnicodeDecodeError as error:
        raise _NoDump(f"it begins as JSON and is no text at byte {error.start}") from None


def _unpickle(data: bytes) -> Any:
    try:
        return _Plain(io.BytesIO(data)).load()
    except _AsksForClass:
        raise
    except DAMAGE:
        if data[:1] == pickle.PROTO:
            raise _NoDump(f"it begins as a pickle, and its {len(data):,} bytes are cut off or overwritten") from None  # fmt: skip
        raise _NoDump(f"it is neither a pickle nor JSON; it begins with {data[:12]!r}") from None


def rank_of(number: int, dump: Mapping[str, Any]) -> Rank:
    rank = Rank(number)
    configs: Mapping[str, Any] = dump.get("pg_config") or {}
    keys = _keys(configs)
    rank.groups = {group for group in keys.values() if group[1]}
    entries: Sequence[Mapping[str, Any]] = dump.get("entries") or ()
    by_local_id: dict[str, Group] = {}
    pairs: set[Group] = set()
    unfinished: list[tuple[int, Group, Mapping[str, Any]]] = []
    for place, entry in enumerate(entries):
        group = _group(entry, keys)
        by_local_id[str(entry.get("pg_id"))] = group
        message = _is_message(entry)
        if message:
            pairs.add(group)
        else:
            _note(rank.progress.setdefault(group, Progress(-1, -1)), entry)
        if entry.get("state") != "completed":
            order = entry.get("record_id")
            unfinished.append((place if order is None else int(order), group, entry))
    _add_status(rank, dump.get("pg_status") or {}, by_local_id, keys, pairs)
    _fill_gaps(rank, unfinished)
    return rank


def _keys(configs: Mapping[str, Any]) -> dict[str, Group]:
    """A group's name in the dump -> how all its ranks call it. Groups of equal purpose and ranks are told apart by their turn."""
    keys: dict[str, Group] = {}
    seen: dict[Group, int] = {}
    for name in sorted(configs, key=_creation):
        config = configs[name]
        # gloo lists the group of all ranks under an empty name. Where no ranks are listed only the name parts groups.
        members = _members(config)
        purpose = str(config.get("desc") or name)
        key = (purpose, members) if members else (f"{purpose} '{name}'", members)
        turn = seen[key] = seen.get(key, 0) + 1
        keys[str(name)] = key if turn == 1 else (f"{key[0]} ({turn})", members)
    return keys


def _creation(name: str) -> tuple[int, str]:
    return (int(name), "") if str(name).isdigit() else (-1, "")


def _members(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`ranks` is a list, or its text "[0, 2]"; PyTorch leaves it empty for the group of all ranks in some versions."""
    return tuple(int(number) for number in re.findall(r"\d+", str(config.get("ranks", ""))))


def _group(entry: Mapping[str, Any], keys: Mapping[str, Group]) -> Group:
    name, purpose = [*(entry.get("process_group") or ("0", "")), ""][:2]
    key = keys.get(str(name)) or keys.get("")
    if key is not None:
        return key
    return (f"{purpose} '{name}'" if purpose else str(name)), ()


def _is_message(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("is_p2p")) or bool(_places(entry))


def _places(entry: Mapping[str, Any]) -> list[int]:
    """Of `send 0->3` and `recv 2<-3`: places in the group."""
    found = re.findall(r"(?:send|recv) (\d+)(?:->|<-)(\d+)", str(entry.get("profiling_name", "")))
    return [int(place) for pair in found for place in pair]


def _partner(entry: Mapping[str, Any], group: Group, number: int) -> int:
    members = group[1]
    named = [members[at] if members else at for at in _places(entry) if not members or at < len(members)]  # fmt: skip
    others = [one for one in named if one != number]
    return others[0] if len(others) == 1 else NOBODY


def _sequence(entry: Mapping[str, Any]) -> int:
    found = entry.get("collective_seq_id", entry.get("seq_id", -1))
    return -1 if found is None else int(found)


def _note(progress: Progress, entry: Mapping[str, Any]) -> None:
    sequence = _sequence(entry)
    progress.issued = max(progress.issued, sequence)
    if entry.get("state") == "completed":
        progress.finished = max(progress.finished, sequence)
    named = operation(entry)
    if progress.operations.setdefault(sequence, named) != named:
        progress.operations[sequence] = "coalesced"


def operation(entry: Mapping[str, Any]) -> str:
    """What must be equal on all ranks: the name, and for some also how many numbers of which type each hands in."""
    name = str(entry.get("profiling_name", "")).rpartition(":")[2]
    if name not in EVEN:
        return name
    sizes = entry.get("input_sizes") or ()
    kinds = sorted({str(kind) for kind in entry.get("input_dtypes") or ()})
    return f"{name} of {sum(math.prod(size) for size in sizes)} {' '.join(kinds) or 'numbers'}"


def _add_status(
    rank: Rank,
    status: Mapping[str, Any],
    by_local_id: Mapping[str, Group],
    keys: Mapping[str, Group],
    pairs: set[Group],
) -> None:
    """`pg_status` counts what the recorder's ring has already forgotten. It is keyed by the rank's own group numbers, which
    only entries translate; groups without entries are matched by their place in both tables where these are as long. A group
    that also carries messages counts them too, and then its status compares with nobody's."""
    ordered = sorted(status, key=_creation)
    by_place = dict(zip(ordered, keys.values(), strict=True)) if len(ordered) == len(keys) else {}
    for local, counts in status.items():
        group = by_local_id.get(str(local)) or by_place.get(local)
        if group is None or group in pairs:
            continue
        progress = rank.progress.setdefault(group, Progress(-1, -1))
        progress.issued = max(progress.issued, int(counts.get("last_enqueued_collective", -1)))
        progress.finished = max(progress.finished, int(counts.get("last_completed_collective", -1)))


def _fill_gaps(rank: Rank, unfinished: list[tuple[int, Group, Mapping[str, Any]]]) -> None:
    """What no status tells: all before the first unfinished collective was finished. And the list of what is pending."""
    for order, group, entry in sorted(unfinished, key=lambda one: one[0]):
        sequence, message = _sequence(entry), _is_message(entry)
        partner = _partner(entry, group, rank.number) if message else None
        if not message:
            progress = rank.progress[group]
            if progress.finished < 0:
                progress.finished = sequence - 1
            if sequence <= progress.finished:
                continue  # gloo marks nothing as completed
        rank.pending.append(
            Pending(order, group, sequence, operation(entry), entry.get("state") == "started", partner)
        )  # fmt: skip
