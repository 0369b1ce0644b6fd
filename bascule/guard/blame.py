"""Which rank held the others up? Read from the dumps that PyTorch's Flight Recorder leaves when a job of many ranks hangs. No torch.

Every collective has a sequence number in its group, and all members issue the same sequence. So these things can be said:

    stopped inside    a rank has not finished collectives that its peers have: its chip stopped working
    never arrived     peers wait in a collective that this rank never issued, and it waits for nothing itself: its process stopped.
                      Messages that it only posted, to ranks that wait for itself, are no excuse
    never began       all issued it and its peers' chips began, this rank's did not, and nothing before it is in its way
    another one       it issued another operation, size or type than most of the group under the same number, or left one out
    gave no dump      ranks wait in groups that it belongs to, and it left nothing: it is dead or unreachable

A rank that is behind but waits in another group is a victim: whoever it waits for comes into question instead. Ranks in that
position are never named; where nothing tells the ranks apart, nobody is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bascule.guard.recorder import Group, Pending, Progress, Rank, read_dumps

CLEAR_LAG = 2
"""Finished collectives behind the peers that cannot be the skew between the moments of two dumps, nor a ring that broke under one."""


@dataclass(frozen=True)
class Blame:
    """`confidence` from 0 to 1: 0.9 proof in the dumps, 0.6 by absence or by elimination, 0.3 a lead, 0.0 nobody named."""

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


Named = dict[int, str]
"""Rank -> what speaks against it."""


def blame(folder: Path, *, died_first: int | None = None) -> Blame:
    """Read all dumps in `folder` and name the guilty ranks. Raises UsageError when there are none to read.

    `died_first`: a rank that its launcher saw dead while all others lived. That comes before what dumps tell: its peers fail in its
    wake, some before they can leave a dump, and look like the dead.
    """
    if died_first is not None:
        told = f"rank {died_first} died while its peers lived"
        return Blame((died_first,), "died before its peers", 0.9, (told,))
    ranks, unreadable = read_dumps(folder)
    found = judge(ranks)
    notes = tuple(f"taken as no dump: {why}" for why in unreadable.values())
    return replace(found, evidence=found.evidence + notes)


def judge(ranks: Mapping[int, Rank]) -> Blame:
    clear, weak = _stopped_inside(ranks)
    proofs = {
        "stopped inside a collective that its peers finished": clear,
        "never issued a collective that its peers wait in": _never_arrived(ranks),
        "issued another operation than its peers under the same number": _different_operation(
            ranks
        ),
        "left out a collective in which its peers stand": _left_out(ranks),
        "never began a collective that its peers began": _never_began(ranks),
    }
    # A mismatch makes backends end processes that are innocent of it, before they can leave a dump.
    odd = any(found for word, found in proofs.items() if word.startswith(("issued", "left out")))
    silent = {} if odd else _silent(ranks)
    named = {rank for found in proofs.values() for rank in found} | silent.keys()
    posted = _only_posted(ranks, named)
    if posted:
        proofs["never issued a collective that its peers wait in"] |= posted
    if any(proofs.values()):
        words = [word for word, found in proofs.items() if found]
        evidence = [line for found in (*proofs.values(), silent) for line in found.values()]
        sure = 0.6 if named == silent.keys() else 0.9
        return Blame(tuple(sorted(named | posted.keys())), " / ".join(words), sure, tuple(evidence))
    if silent:
        words = ["gave no dump: dead or unreachable"]
        return Blame(tuple(sorted(silent)), words[0], 0.6, tuple(silent.values()))
    if len(weak) == 1:
        return Blame(tuple(weak), "one collective behind its peers", 0.3, tuple(weak.values()))
    return _nobody(ranks, weak)


def _nobody(ranks: Mapping[int, Rank], weak: Named) -> Blame:
    leads = [*weak.values(), *_all_arrived(ranks)]
    reason = "no rank differs from its peers in these dumps"
    if leads:
        reason += "; where they stand says which group to look at"
    return Blame((), reason, 0.0, tuple(leads))


# --- what speaks against a rank -------------------------------------------------------------------------------------------


def _stopped_inside(ranks: Mapping[int, Rank]) -> tuple[Named, Named]:
    """Ranks that issued collectives which peers finished and they did not: (clear cases, cases within the dumps' skew). One that is
    fed from one side, such as a broadcast, its root finishes alone: it counts for nothing."""
    clear: Named = {}
    weak: Named = {}
    for (name, group), by_rank in _by_group(ranks).items():
        furthest = max(progress.finished for progress in by_rank.values())
        for number, progress in by_rank.items():
            last = min(furthest, progress.issued)
            behind = sum(
                not _one_sided(progress.operations.get(at, ""))
                for at in range(last, max(progress.finished, last - 64), -1)
            )
            if behind <= 0:
                continue
            told = f"rank {number} finished {name} {list(group)} up to {progress.finished}, its peers up to {furthest}"
            (clear if behind >= CLEAR_LAG else weak).setdefault(number, told)
    return clear, weak


def _one_sided(operation: str) -> bool:
    return operation.startswith(("broadcast", "reduce of", "_reduce_oop", "gather", "scatter"))


def _never_arrived(ranks: Mapping[int, Rank]) -> Named:
    """Ranks that somebody waits for and that wait for nobody."""
    idle = {number for number, rank in ranks.items() if not rank.waits}
    found = {number: told for number, told in _not_issued(ranks).items() if number in idle}
    for number, rank in ranks.items():
        for message in rank.messages:
            if message.partner in idle:
                found.setdefault(
                    message.partner,
                    f"rank {number} waits for a message to or from rank {message.partner}, which waits for nothing",
                )
    return found


def _not_issued(ranks: Mapping[int, Rank]) -> Named:
    """Ranks that have not issued a collective which peers wait in, whatever they wait for themselves."""
    found: Named = {}
    for (name, group), by_rank in _by_group(ranks).items():
        waiting = {number: p.finished + 1 for number, p in by_rank.items() if p.issued > p.finished}
        for number in {*by_rank, *(group if waiting else ())} & ranks.keys():
            issued = by_rank[number].issued if number in by_rank else -1
            late = [other for other, wanted in waiting.items() if wanted > issued]
            if late:
                told = f"rank {number} issued {name} {list(group)} up to {issued}; {len(late)} peers wait in the next"
                found.setdefault(number, told)
    return found


def _only_posted(ranks: Mapping[int, Rank], named: set[int]) -> Named:
    """Ranks that have not issued what peers wait in, whose only excuse are messages, and of these whoever they wait for waits for them
    in turn: nobody else stands behind it. A process that stopped after posting its receives looks like that."""
    late = _not_issued(ranks)
    found: Named = {}
    for number, told in late.items():
        rank = ranks[number]
        if number in named or rank.collectives or not rank.messages:
            continue
        behind = _stands_behind(number, ranks)
        if number not in behind or behind & named or behind - ranks.keys():
            continue
        if {one for one in behind & late.keys() if not ranks[one].collectives} == {number}:
            found[number] = f"{told}; the messages it waits for come from ranks that wait for it"
    return found


def _stands_behind(number: int, ranks: Mapping[int, Rank]) -> set[int]:
    """Everyone that `number` waits for, directly or through others."""
    behind: set[int] = set()
    ahead = [number]
    while ahead:
        rank = ranks.get(ahead.pop())
        for other in _waits_for(rank, ranks) - behind if rank else ():
            behind.add(other)
            ahead.append(other)
    return behind


def _waits_for(rank: Rank, ranks: Mapping[int, Rank]) -> set[int]:
    """Partners of its messages, and whose chips are not yet in its first collective: later ones queue behind that."""
    found = {one.partner for one in rank.messages if one.partner is not None and one.partner >= 0}
    for one in rank.collectives[:1]:
        found |= {other for other in one.group[1] if not _stands_in(ranks.get(other), one)}
    return found - {rank.number}


def _stands_in(rank: Rank | None, wanted: Pending) -> bool:
    """Is that collective the first thing its chip has still to do?"""
    first = next(iter(rank.collectives), None) if rank else None
    return first is not None and (first.group, first.sequence) == (wanted.group, wanted.sequence)


def _never_began(ranks: Mapping[int, Rank]) -> Named:
    """Dumps with timing tell what a chip has begun: a rank's oldest work has not, though all peers' chips are inside it."""
    found: Named = {}
    for number, rank in ranks.items():
        first = next(iter(rank.pending), None)
        if first is None or first.started or first.partner is not None or not first.group[1]:
            continue
        same = [
            one
            for other in first.group[1]
            if other != number and other in ranks
            for one in ranks[other].pending
            if (one.group, one.sequence) == (first.group, first.sequence)
        ]
        if len(same) == len(first.group[1]) - 1 and same and all(one.started for one in same):
            name, group = first.group
            found[number] = (
                f"rank {number} issued {first.operation} number {first.sequence} of {name} {list(group)} and its chip never began it; all its peers' did"
            )
    return found


def _different_operation(ranks: Mapping[int, Rank]) -> Named:
    """Ranks whose operation under one number is not what most of the group issued under it."""
    found: Named = {}
    for (name, group), by_rank in _by_group(ranks).items():
        for number in sorted(set().union(*(p.operations for p in by_rank.values()))):
            asked = {r: p.operations[number] for r, p in by_rank.items() if number in p.operations}
            common = _majority(list(asked.values()))
            if common is None or "coalesced" in asked.values():
                continue  # no majority, no culprit; and a batch may be in the ring in part only
            for rank, operation in asked.items():
                if operation != common:
                    found.setdefault(
                        rank,
                        f"rank {rank} issued {operation} as number {number} of {name} {list(group)}, its peers {common}",
                    )
    return found


def _left_out(ranks: Mapping[int, Rank]) -> Named:
    """A rank whose peers all stand in a collective that it never issued, while it stands in a later one and waits there for those very
    peers: one program cannot lead to both, and it is alone with its own."""
    found: Named = {}
    for rank in ranks.values():
        for one in rank.collectives[:1]:
            standing = {other for other in one.group[1] if _stands_in(ranks.get(other), one)}
            missing = set(one.group[1]) - standing
            alone = (
                ranks.get(next(iter(missing))) if len(missing) == 1 and len(standing) > 1 else None
            )
            if alone is None or not alone.collectives or _issued(alone, one):
                continue
            awaits = _waits_for(alone, ranks) - {m.partner for m in alone.messages}
            if awaits and awaits <= standing:
                name, group = one.group
                found[alone.number] = (
                    f"rank {alone.number} never issued {one.operation} number {one.sequence} of {name} {list(group)}, in which all its peers stand, and went on without"
                )
    return found


def _issued(rank: Rank, wanted: Pending) -> bool:
    progress = rank.progress.get(wanted.group)
    return progress is not None and progress.issued >= wanted.sequence


def _majority(values: list[str]) -> str | None:
    common = max(sorted(set(values)), key=values.count)
    return common if 2 * values.count(common) > len(values) else None


def _silent(ranks: Mapping[int, Rank]) -> Named:
    """Ranks without a dump that others wait for. Where most of a job left none, the folder is what is incomplete."""
    members = {number for rank in ranks.values() for _, group in rank.groups for number in group}
    members |= {n for rank in ranks.values() for _, group in rank.progress for n in group}
    gone = members - ranks.keys()
    if 2 * len(gone) > len(members):
        return {}
    found: Named = {}
    for rank in ranks.values():
        for one in rank.pending:
            waited = one.group[1] if one.partner is None else (one.partner,)
            for number in sorted(gone.intersection(waited)):
                found.setdefault(number, f"rank {number} left no dump, and ranks wait for it in {one.group[0]}")  # fmt: skip
        for (name, group), progress in rank.progress.items():
            if progress.issued > progress.finished:
                for number in sorted(gone.intersection(group)):
                    found.setdefault(number, f"rank {number} left no dump, and ranks wait for it in {name}")  # fmt: skip
    return dict(sorted(found.items()))


def _all_arrived(ranks: Mapping[int, Rank]) -> list[str]:
    """Collectives that all members stand in and none finished: a link, or one of their chips; which one the dumps do not tell."""
    found = {}
    for rank in ranks.values():
        first = next(iter(rank.collectives), None)
        if first is None or not first.group[1] or (first.group, first.sequence) in found:
            continue
        if all(_stands_in(ranks.get(other), first) for other in first.group[1]):
            name, group = first.group
            found[first.group, first.sequence] = (
                f"all of {name} {list(group)} stand in {first.operation} number {first.sequence} and none finished it: a link, or one of their chips"
            )
    return list(found.values())


def _by_group(ranks: Mapping[int, Rank]) -> dict[Group, dict[int, Progress]]:
    groups: dict[Group, dict[int, Progress]] = {}
    for rank in ranks.values():
        for group, progress in rank.progress.items():
            groups.setdefault(group, {})[rank.number] = progress
    return groups


def describe(found: Blame) -> Iterable[str]:
    """Lines for people."""
    who = ", ".join(str(number) for number in found.guilty_ranks) or "nobody"
    yield f"guilty: {who} (confidence {found.confidence:g}): {found.reason}"
    yield from (f"  {line}" for line in found.evidence)
