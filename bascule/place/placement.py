"""Verdicts and the owner's order decide which pool takes which role. Facts in, a record out; no torch, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import get_args

from bascule.errors import NoPoolLeft
from bascule.records import CUT_OFF, Placement, Role, Verdict

Condemned = Collection[tuple[str, Role]]
WORK = {"train": "training", "infer": "inference"}


def place(
    verdicts: Iterable[Verdict],
    order: Sequence[str],
    condemned: Condemned = (),
    *,
    required: bool = True,
) -> Placement:
    """Give each role to the first pool of `order` that may take it. The newest verdict of a pool and role counts.

    A pool that is `unfit` or condemned for a role never gets it. `unproven` pools, and pools nobody qualified, get it only
    with `required=False`. Raises NoPoolLeft with the reason for every pool.
    """
    newest = {(verdict.pool, verdict.role): verdict for verdict in verdicts}
    chosen: dict[Role, str] = {}
    reasons: dict[str, str] = {}
    for role in get_args(Role):
        refused: list[str] = []
        for pool in order:
            objection = _objection(pool, role, newest.get((pool, role)), condemned, required)
            if objection is None:
                chosen[role] = pool
                reasons[role] = _reason(pool, role, newest.get((pool, role)), refused)
                break
            refused.append(objection)
        else:
            raise NoPoolLeft(_nothing_left(role, order, refused, required))
    return Placement(train=chosen["train"], infer=chosen["infer"], reasons=reasons)


def _objection(
    pool: str, role: Role, verdict: Verdict | None, condemned: Condemned, required: bool
) -> str | None:
    """Why `pool` may not take `role`, or None when it may."""
    if (pool, role) in condemned:
        return f"'{pool}' was condemned for {WORK[role]} during this run"
    if verdict is None:
        return f"'{pool}' has no verdict for {WORK[role]}" if required else None
    if verdict.verdict == "unfit":
        return f"'{pool}' ({verdict.chip}) is unfit for {WORK[role]}: {_first(verdict)}"
    if verdict.verdict == "unproven" and required:
        return f"'{pool}' ({verdict.chip}) is unproven for {WORK[role]}: {_first(verdict)}"
    return None


def _reason(pool: str, role: Role, verdict: Verdict | None, refused: Sequence[str]) -> str:
    word = (
        f"its verdict for {WORK[role]} is {verdict.verdict}"
        if verdict
        else f"nobody qualified it for {WORK[role]}, and the recipe allows that"
    )
    if not refused:
        return f"'{pool}' comes first in the owner's order and {word}."
    return f"'{pool}' is next in the owner's order and {word}; before it: {'; '.join(refused)}."


def _nothing_left(role: Role, order: Sequence[str], refused: Sequence[str], required: bool) -> str:
    if not order:
        return f"No pool can take {WORK[role]}: the recipe lists no pool. Add one under [pools]."
    # A run keeps the recipe it began with: what needs another recipe needs another run.
    another = "begin another run (--name) with another pool under [pools]"
    if required and any("unproven" in text or "no verdict" in text for text in refused):
        another += ", a longer qualify.time_limit_s, or qualify.required = false"
    if required and any(CUT_OFF in text for text in refused):
        another = f"Run the same command again: the examination goes on where it was cut off; or {another}"
    if any("condemned" in text for text in refused):
        another = f"Mend a condemned chip, let it back with `bascule qualify POOL --readmit RUN` and run the same command again; or {another}"
    return (
        f"No pool can take {WORK[role]}: {'; '.join(refused)}. {another[0].upper()}{another[1:]}."
    )


def _first(verdict: Verdict) -> str:
    return verdict.reasons[0].rstrip(".") if verdict.reasons else "no reason was recorded"
