"""Whose fault was it? The same step again: here, on another kind of chip, with another batch. Nine in ten suspicions are not
the hardware's (Gemini 2.5: 94 %), so a sentinel's cry is never believed without a replay.

    the step as first computed   same step here   same step on the referee   what it means
    differs from the referee     agrees with it   -                          transient chip fault
    differs from the referee     differs too      -                          persistent chip fault (software, where the
                                                                             referee is the same kind of chip)
    agrees with the referee      -                another batch is normal    data
    agrees with the referee      -                another batch is not       optimisation
    a product broke its checksum, though all gradients agree                 transient or persistent, as it repeats
    a product breaks its checksum on the referee too                         no chip's fault: the bound does not hold at these
                                                                             weights (software, where the kinds are the same)

"Agrees" is a measured word: per tensor, within the step's own response to weights moved by one unit in the last place, worked
out on the referee (numerics.py). On chips with equal kernels the errors are zero and nothing needs to be measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bascule import draws, numerics
from bascule.accelerators.base import Accelerator
from bascule.guard.checksum import Checksums, Product, Violation, parameter_names
from bascule.records import Attribution, Replay

MARGIN = 8.0
PERTURBATIONS = ((2, 1), (6, 4))
"""(how many, by how many ulps): first the cheap floor; before an accusation the deep one, which also meets routing ties."""

REPEATS = 2
FIRST_REPLAY = 8
"""Attempt number of the first replay: beyond the loop's own retries of a step, so that no two computations share a number."""


class StepBatch(Protocol):
    @property
    def step(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...


class StepProposal(Protocol):
    """What the guard reads of train's Proposal."""

    @property
    def step(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def batch(self) -> Any: ...
    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def grads(self) -> dict[str, Tensor]: ...
    @property
    def expert_loads(self) -> Tensor | None: ...
    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def attempt(self) -> int: ...


class Recomputer(Protocol):
    """What the guard asks of train's Stepper: the same weights, any batch, any chip, nothing changed. `rehearse` gives the
    weights by name that committing a proposal would leave, worked out on the given chip; `reach` how far it can move each at most
    (2-norm, share of the parameter's own length); `kept` the live tensors beside the parameters that only a commit changes."""

    @property
    def model(self) -> nn.Module: ...

    def recompute(
        self,
        batch: Any,
        accelerator: Accelerator | None = None,
        attempt: int = 0,
        watch: Callable[[int, str, Any], AbstractContextManager[None]] | None = None,
    ) -> Any: ...

    def rehearse(self, proposal: Any, accelerator: Accelerator) -> Mapping[str, Tensor]: ...

    def reach(self, proposal: Any) -> Mapping[str, tuple[float, float]]: ...

    def kept(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Difference:
    """Two computations of one step, held together. `tensor` is the one furthest outside, or the furthest of all."""

    agrees: bool
    error: float
    bound: float
    tensor: str
    detail: str


@dataclass
class Finding:
    """The outcome of an investigation, with everything an incident needs."""

    attribution: Attribution
    evidence: str
    replays: list[Replay]
    violations: list[Violation]
    gradients: dict[str, dict[str, Tensor]]
    product: Product | None = None
    clean: Any = None
    """A proposal for this step that the evidence supports; None when there is none from this chip."""


class NoiseFloor:
    """The response of a whole step's gradients to weights moved by a few ulps, measured on the referee, lazily.

    Measuring costs some replays, so nothing is measured while computations agree bit for bit; a floor that was measured is
    kept for `keep_steps` and measured anew where it would decide.
    """

    def __init__(self, referee: Accelerator, *, margin: float = MARGIN) -> None:
        self.referee = referee
        self.margin = margin
        self._cache: tuple[int, int, dict[str, numerics.Comparison], numerics.Comparison] | None = (
            None
        )

    def compare(
        self, measured: StepProposal, right: StepProposal, stepper: Recomputer
    ) -> Difference:
        """`right` comes from the referee (or was shown to agree with it). The depth grows before the answer is `differs`."""
        if _bit_equal(measured, right):
            return Difference(True, 0.0, 0.0, "", "equal bit for bit")
        if not _same_finiteness(measured, right):
            return Difference(
                False,
                math.inf,
                0.0,
                "",
                f"one is finite, the other is not (loss {measured.loss} and {right.loss})",
            )
        answer = Difference(False, math.inf, 0.0, "", "not measured")
        for depth in range(len(PERTURBATIONS)):
            floors, loss_floor = self._floors(right, stepper, depth)
            answer = self._hold(measured, right, floors, loss_floor)
            if answer.agrees:
                break
        return answer

    def _hold(
        self,
        measured: StepProposal,
        right: StepProposal,
        floors: Mapping[str, numerics.Comparison],
        loss_floor: numerics.Comparison,
    ) -> Difference:
        excess, worst = -1.0, Difference(True, 0.0, 0.0, "", "")
        pairs = {**measured.grads, "loss": torch.tensor(measured.loss, dtype=torch.float64)}
        rights = {**right.grads, "loss": torch.tensor(right.loss, dtype=torch.float64)}
        for name, tensor in pairs.items():
            found = numerics.compare(tensor, rights[name])
            floor = loss_floor if name == "loss" else floors[name]
            unit = numerics.tolerance(
                right.grads[name].dtype if name in right.grads else torch.float32
            ).unit
            bound, tail = self.margin * max(floor.rms, unit), self.margin * max(floor.tail, unit)
            ratio = math.inf if found.nonfinite else max(found.rms / bound, found.tail / tail)
            if ratio > excess:
                detail = f"{name}: error {found.rms:.2e} (largest {found.tail:.2e}), allowed {bound:.1e} ({tail:.1e})"
                excess, worst = ratio, Difference(ratio <= 1.0, found.rms, bound, name, detail)
        return worst

    def _floors(
        self, right: StepProposal, stepper: Recomputer, depth: int
    ) -> tuple[dict[str, numerics.Comparison], numerics.Comparison]:
        if self._cache is not None and self._cache[0] == right.step and self._cache[1] >= depth:
            return self._cache[2], self._cache[3]
        floors: dict[str, numerics.Comparison] = {}
        loss_floor = numerics.compare(torch.zeros(1), torch.zeros(1))
        repeats, ulps = PERTURBATIONS[depth]
        for repeat in range(repeats):
            with moved_weights(
                stepper.model, draws.key(right.step, "guard.floor", depth, repeat), ulps
            ):
                moved = stepper.recompute(right.batch, self.referee, FIRST_REPLAY)
            for name, grad in moved.grads.items():
                floors[name] = _larger(floors.get(name), numerics.compare(grad, right.grads[name]))
            loss_floor = _larger(
                loss_floor, numerics.compare(torch.tensor([moved.loss]), torch.tensor([right.loss]))
            )
        self._cache = (right.step, depth, floors, loss_floor)
        return floors, loss_floor


@contextmanager
def moved_weights(model: nn.Module, key: int, ulps: int) -> Iterator[None]:
    """Every weight moved by up to `ulps` units in the last place inside the block, and put back bit for bit after it."""
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        with torch.no_grad():
            for place, (parameter, value) in enumerate(kept):
                moved = value
                for nudge in range(ulps):
                    moved = numerics.perturb_one_ulp(moved, draws.key(key, "weights", place, nudge))
                parameter.copy_(moved)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


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
        modes.append(Checksums(names=parameter_names(model), keep=True))
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
    them, when `count` is 0, or when its tensors do not share a first dimension."""
    sizes = {len(tensor) for tensor in batch.tensors.values()}
    if count == 0 or len(sizes) != 1 or count >= min(sizes):
        return batch
    rows = torch.from_numpy(draws.permutation(key, sizes.pop())[:count]).sort().values
    cut = {name: tensor[rows] for name, tensor in batch.tensors.items()}
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
) -> Finding:
    """Replay a suspicious step and say whose fault it was.

    `violations`: what checksums saw while it was first computed. `other_batches`: recent batches that trained well, to part
    data from optimisation. `looks_normal`: do the sentinels accept this? `same_kind`: the referee is the same kind of chip.
    """
    there = again(stepper, proposal.batch, FIRST_REPLAY, floor.referee)
    right = there.proposal
    here = [again(stepper, proposal.batch, FIRST_REPLAY + 1 + repeat) for repeat in range(REPEATS)]
    if not same_kind:
        broken = {violation.op_index for violation in there.violations}
        violations = [one for one in violations if one.op_index not in broken]
        for one in here:
            one.violations = [v for v in one.violations if v.op_index not in broken]
            if not one.violations:
                one.product = None
    first = floor.compare(proposal, right, stepper)
    repeats = [floor.compare(one.proposal, right, stepper) for one in here]
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
    for one, found in zip(here, repeats, strict=True):
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
        not found.agrees or bool(one.violations) for one, found in zip(here, repeats, strict=True)
    ]
    if guilty_now or any(guilty_again):
        _blame_chip(finding, first, guilty_now, guilty_again, same_kind)
        finding.clean = next(
            (one.proposal for one, guilty in zip(here, guilty_again, strict=True) if not guilty),
            None,
        )
    else:
        _blame_run(finding, stepper, other_batches, looks_normal)
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


def _blame_run(
    finding: Finding,
    stepper: Recomputer,
    others: Sequence[StepBatch],
    looks_normal: Callable[[StepProposal], bool],
) -> None:
    """The chip is cleared: every computation of this step agrees. Is it the batch or the weights?"""
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


def _bit_equal(one: StepProposal, other: StepProposal) -> bool:
    return one.loss == other.loss and all(
        torch.equal(grad, other.grads[name].to(grad.device)) for name, grad in one.grads.items()
    )


def _same_finiteness(one: StepProposal, other: StepProposal) -> bool:
    return math.isfinite(one.loss) == math.isfinite(other.loss) and math.isfinite(
        one.grad_norm
    ) == math.isfinite(other.grad_norm)


def _larger(one: numerics.Comparison | None, other: numerics.Comparison) -> numerics.Comparison:
    return other if one is None or other.rms > one.rms else one


def _number(value: float) -> float | None:
    """Records hold None where there is no finite number."""
    return value if math.isfinite(value) else None
