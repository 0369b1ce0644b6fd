"""Whose fault was it? The same step again: here, on another kind of chip, with another batch. Nine in ten suspicions are not
the hardware's (Gemini 2.5: 94 %), so a sentinel's cry is never believed without a replay.

    the step as first computed   same step here   same step on the referee   what it means
    differs from the referee     agrees with it   -                          transient chip fault
    differs from the referee     differs too      -                          persistent chip fault (software, where the
                                                                             referee is the same kind of chip)
    agrees with the referee      -                another batch is normal    data
    agrees with the referee      -                another batch is not       optimisation
    agrees, and the certified weights take this batch well                   optimisation: the weights went wrong since (backwards.py)
    agrees, and no sentinel finds it abnormal                                unknown
    a product broke its checksum, though all gradients agree                 transient or persistent, as it repeats
    a product breaks its checksum on the referee too                         no chip's fault: the bound does not hold at these
                                                                             weights (software, where the kinds are the same)

"Agrees" is a measured word (guard/noise). Where the pool has another chip of the kind, a fault that repeats is asked of it too: right there,
this chip is at fault; wrong there, what the kind shares.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bascule import draws
from bascule.accelerators.base import Accelerator
from bascule.errors import DeviceFault
from bascule.guard.backwards import Older, Since, since_when
from bascule.guard.checksum import Checksums, Product, Violation, parameter_names
from bascule.guard.culprit import first_wrong_operator
from bascule.guard.noise import Difference, NoiseFloor
from bascule.guard.proposal import FIRST_REPLAY, Recomputer, StepBatch, StepProposal
from bascule.model import seats
from bascule.records import Attribution, Replay

REPEATS = 2


@dataclass
class Finding:
    """The outcome of an investigation, with everything an incident needs."""

    attribution: Attribution
    evidence: str
    replays: list[Replay]
    violations: list[Violation]
    gradients: dict[str, dict[str, Tensor]]
    product: Product | None = None
    operator: str = ""
    """The first operator that is wrong for the inputs it had: a product that broke its checksum, or whatever guard/culprit found."""
    clean: Any = None
    """A proposal for this step that the evidence supports; None when there is none from this chip."""


@dataclass
class Again:
    """One computation of a step under full checksums. `products`: how many were checked."""

    proposal: Any
    violations: list[Violation] = field(default_factory=list)
    product: Product | None = None
    products: int = 0


def again(
    stepper: Recomputer, batch: StepBatch, attempt: int, accelerator: Accelerator | None = None
) -> Again:
    """Recompute a step with every product checked; the first wrong one is kept."""
    modes: list[Checksums] = []

    def watch(step: int, phase: str, model: nn.Module) -> AbstractContextManager[None]:
        modes.append(Checksums(names=parameter_names(model), keep=True, turn=step))
        return modes[-1]  # type: ignore[return-value]

    proposal = stepper.recompute(batch, accelerator, attempt, watch)
    found = [violation for mode in modes for violation in mode.violations()]
    return Again(
        proposal,
        found,
        next((mode.kept for mode in modes if mode.kept is not None), None),
        sum(mode.products_checked for mode in modes),
    )


def some_sequences(batch: Any, count: int, key: int) -> Any:
    """The batch cut to `count` of its sequences, drawn from `key` and in their old order; the batch itself when that is all of
    them, when `count` is 0, or when its tensors do not share a first dimension. How a whole batch was seated (model/seats.py) does not
    hold for a part of it, which is worked out padded."""
    tensors = {name: one for name, one in batch.tensors.items() if name not in seats.NAMES}
    sizes = {len(tensor) for tensor in tensors.values()}
    if count == 0 or len(sizes) != 1 or count >= min(sizes):
        return batch
    rows = torch.from_numpy(draws.permutation(key, sizes.pop())[:count]).sort().values
    cut = {name: tensor[rows] for name, tensor in tensors.items()}
    if not all(bool(tensor.bool().any()) for tensor in cut.values()):
        return batch  # none of the chosen sequences counts: their loss would be 0 / 0
    return dataclasses.replace(batch, tensors=cut)


def investigate(
    proposal: StepProposal,
    stepper: Recomputer,
    floor: NoiseFloor,
    *,
    violations: Sequence[Violation] = (),
    other_batches: Sequence[StepBatch] = (),
    looks_normal: Callable[[StepProposal], bool] = lambda _: True,
    same_kind: bool = False,
    sibling: Callable[[], Accelerator | None] = lambda: None,
    older: Callable[[], Sequence[Older]] = tuple,
    repeats: int = REPEATS,
) -> Finding:
    """Replay a suspicious step and say whose fault it was.

    `violations`: what checksums saw while it was first computed. `other_batches`: recent batches that trained well, to part
    data from optimisation. `looks_normal`: do the sentinels accept this? `same_kind`: the referee is the same kind of chip. `sibling`
    opens another chip of the pool, if there is one; asked only when the fault repeats. `older`: snapshots of this phase from the newest
    certified one on, oldest first; asked only when the chip is cleared. `repeats`: how often here.
    """
    there = again(stepper, proposal.batch, FIRST_REPLAY, floor.referee)
    right = there.proposal
    here = [again(stepper, proposal.batch, FIRST_REPLAY + 1 + repeat) for repeat in range(repeats)]
    if not same_kind:
        broken = {violation.op_index for violation in there.violations}
        violations = [one for one in violations if one.op_index not in broken]
        for one in here:
            one.violations = [v for v in one.violations if v.op_index not in broken]
            if not one.violations:
                one.product = None
    first = floor.compare(proposal, right, stepper)
    answers = [floor.compare(one.proposal, right, stepper) for one in here]
    replays = [
        Replay(
            where=f"referee ({floor.referee.name})",
            agrees=first.agrees,
            error=_number(first.error),
            bound=first.bound,
            detail=first.detail
            + (f"; breaks a bound there too: {there.violations[0]}" if there.violations else ""),
        )
    ]
    for one, found in zip(here, answers, strict=True):
        wrong = f"; {one.violations[0]}" if one.violations else ""
        replays.append(
            Replay(
                where="here again, against the referee",
                agrees=found.agrees,
                error=_number(found.error),
                bound=found.bound,
                detail=found.detail + wrong,
            )
        )
    finding = Finding(
        "unknown",
        "",
        replays,
        list(violations),
        {"first": proposal.grads, "referee": right.grads, "here": here[0].proposal.grads},
    )
    finding.product = next((one.product for one in here if one.product is not None), None)
    for one in here:
        finding.violations += [
            violation for violation in one.violations if violation not in finding.violations
        ]
    guilty_now = not first.agrees or bool(violations)
    guilty_again = [
        not found.agrees or bool(one.violations) for one, found in zip(here, answers, strict=True)
    ]
    if guilty_now or any(guilty_again):
        _blame_chip(finding, first, guilty_now, guilty_again, same_kind)
        if any(guilty_again):
            _name_operator(finding, proposal, stepper, floor)
            _ask_sibling(finding, proposal, right, stepper, floor, sibling())
        finding.clean = next(
            (one.proposal for one, guilty in zip(here, guilty_again, strict=True) if not guilty),
            None,
        )
    else:
        _blame_run(finding, proposal, stepper, other_batches, looks_normal)
        # Samples of the present policy tell nothing of older weights: to those they are unlikely, and clipped.
        if finding.attribution in ("data", "optimisation") and proposal.phase != "grpo":
            control = other_batches[-1]
            since = since_when(
                proposal.batch, control, stepper, floor.referee, older(), looks_normal
            )
            if since is not None:
                _ask_older(finding, since, proposal.step)
        finding.clean = proposal
    return finding


def _blame_chip(
    finding: Finding,
    first: Difference,
    guilty_now: bool,
    guilty_again: Sequence[bool],
    same_kind: bool,
) -> None:
    what = str(finding.violations[0]) if finding.violations else first.detail
    if not guilty_now:
        finding.attribution = "persistent chip fault"
        finding.evidence = f"the step as first computed agrees with the referee, but this chip computes it wrong in {sum(guilty_again)} of {len(guilty_again)} replays: {what}"
    elif not any(guilty_again):
        finding.attribution = "transient chip fault"
        finding.evidence = f"wrong once, right in {len(guilty_again)} replays on the same chip and on the referee: {what}"
    else:
        finding.attribution = (
            "software" if same_kind and not finding.violations else "persistent chip fault"
        )
        finding.evidence = f"wrong again in {sum(guilty_again)} of {len(guilty_again)} replays on the same chip, right on the referee: {what}"


def _name_operator(
    finding: Finding, proposal: StepProposal, stepper: Recomputer, floor: NoiseFloor
) -> None:
    if finding.violations:
        finding.operator = str(finding.violations[0])
        return
    found = first_wrong_operator(stepper, proposal.batch, FIRST_REPLAY + 2 + REPEATS, floor.referee)
    finding.operator = "" if found is None else str(found)
    told = f"first operator that differs: {found}" if found else "no operator that the referee could be asked is wrong for the inputs it had"  # fmt: skip
    finding.evidence += f"; {told}"


def _ask_sibling(
    finding: Finding,
    proposal: StepProposal,
    right: StepProposal,
    stepper: Recomputer,
    floor: NoiseFloor,
    sibling: Accelerator | None,
) -> None:
    """The same step on another chip of the kind: is it this chip, or all of them?"""
    if sibling is None:
        return
    where = f"another chip of the kind ({sibling.name}), against the referee"
    try:
        one = again(stepper, proposal.batch, FIRST_REPLAY + 1 + REPEATS, sibling)
    except (RuntimeError, DeviceFault) as error:  # its own failure clears nobody and accuses nobody
        finding.replays.append(Replay(where=where, agrees=False, error=None, bound=None, detail=f"it failed: {error}"))  # fmt: skip
        return
    found = floor.compare(one.proposal, right, stepper)
    wrong = bool(one.violations) or not found.agrees
    what = str(one.violations[0]) if one.violations else found.detail
    finding.replays.append(
        Replay(where=where, agrees=not wrong, error=_number(found.error), bound=found.bound, detail=what)
    )  # fmt: skip
    if wrong:
        finding.attribution = "software"
        finding.evidence += f"; wrong on {sibling.name} too, another chip of the kind: {what}"
    else:
        finding.attribution = "persistent chip fault"
        finding.evidence += f"; right on {sibling.name}, another chip of the kind"


def _ask_older(finding: Finding, found: Since, step: int) -> None:
    """What older weights make of the batch. It outweighs what the present ones make of other batches: a spoilt row of the embedding
    is seen only by a batch that holds its token."""
    finding.replays += found.replays
    finding.evidence += f"; {found.told(step)}"
    if finding.attribution == "data" and found.normal is not None:
        finding.attribution = "optimisation"
        finding.evidence += ": it is the weights, not the batch"


def _blame_run(
    finding: Finding,
    proposal: StepProposal,
    stepper: Recomputer,
    others: Sequence[StepBatch],
    looks_normal: Callable[[StepProposal], bool],
) -> None:
    """The chip is cleared: every computation of this step agrees. Is it the batch or the weights?"""
    if looks_normal(proposal):
        finding.attribution = "unknown"
        finding.evidence = "this chip and the referee agree on the step, and its loss and gradients look normal: what raised the alarm does not show in them"
        return
    if not others:
        finding.attribution = "unknown"
        finding.evidence = "this chip and the referee agree on the step; no earlier batch is at hand to tell data from optimisation"
        return
    normal = [looks_normal(stepper.recompute(batch, None, FIRST_REPLAY)) for batch in others]
    finding.replays.append(
        Replay(
            where=f"here, with {len(others)} earlier batches",
            agrees=all(normal),
            error=None,
            bound=None,
            detail=f"{sum(normal)} of {len(normal)} look normal",
        )
    )
    if all(normal):
        finding.attribution = "data"
        finding.evidence = "this chip and the referee agree on the step, and earlier batches are normal at these weights: it is this batch"
    else:
        finding.attribution = "optimisation"
        finding.evidence = "this chip and the referee agree on the step, and earlier batches are abnormal at these weights too"


def _number(value: float) -> float | None:
    """Records hold None where there is no finite number."""
    return value if math.isfinite(value) else None
