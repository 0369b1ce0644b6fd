"""Is the run on this chip still the same run? Recorded good steps are replayed here before anything continues.

Certification left a witness beside each certified snapshot: the step that followed it, with loss and every gradient, on which two
kinds of chip agreed. The new chip must compute the same from that snapshot's weights, within the noise measured on the referee
(guard/noise.NoiseFloor: the response to weights moved by one unit in the last place), tensor by tensor; and what its optimizer makes
of the recorded gradients must be what the referee's makes of them (guard/update). Asked are the witness of the snapshot that the run
goes on from, and those of the certified snapshots before it, as far as they are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bascule.accelerators.base import Accelerator
from bascule.errors import ContinuationRefused, SnapshotError
from bascule.guard import update
from bascule.guard.noise import NoiseFloor
from bascule.ledger import Ledger
from bascule.records import Continuation
from bascule.train import checkpoint
from bascule.train.objective import Objective
from bascule.train.step import Proposal, Stepper

MOST_REPLAYED = 3
"""Recorded steps asked at most. Each costs a step, its update twice and, where the kinds of chip differ, the noise of both."""


@dataclass(frozen=True)
class Replayed:
    """One recorded step, held against what this chip makes of it."""

    step: int
    agrees: bool
    error: float
    bound: float
    detail: str


def prove(
    snapshot: Path,
    stepper: Stepper,
    referee: Accelerator,
    ledger: Ledger,
    objectives: Mapping[str, Objective],
    *,
    on_replay: Callable[[], None] = lambda: None,
) -> Continuation | None:
    """Replay the witness of `snapshot`, which `stepper` has just loaded, and of earlier certified ones; record the answer. `stepper` is
    left as it was. `objectives`: by phase; a witness may be of another phase than its snapshot, being the step after it.

    Returns None, with a warning in the ledger, when the snapshot has no witness (it was never certified). Raises
    ContinuationRefused when this chip computes something else, and SnapshotError when the snapshot's own witness is damaged.
    """
    trust = checkpoint.trust(snapshot)
    if trust.witness is None:
        ledger.warn(
            "continuation not verified",
            f"{snapshot.name} is {trust.state} and has no witness; only its hashes were checked",
        )
        return None
    found = []
    with stepper.aside():
        found.append(_replay(snapshot, stepper, referee, objectives))
        for earlier in _earlier(snapshot):
            on_replay()
            if not found[-1].agrees or len(found) == MOST_REPLAYED:
                break
            try:
                if not _is_certified(earlier):
                    continue
                _stand_at(earlier, stepper, objectives)
                found.append(_replay(earlier, stepper, referee, objectives))
            except SnapshotError as error:
                ledger.warn("recorded step not replayed", str(error))
    told = _told(found)
    ledger.append(told)
    if not told.verified:
        raise ContinuationRefused(
            f"{stepper.accelerator.name} does not continue the run from {snapshot.name}: {told.detail}. The pool is left; "
            f"qualify it (bascule qualify) before it trains again."
        )
    return told


def _earlier(snapshot: Path) -> list[Path]:
    """Snapshots before this one, newest first."""
    return [path for path in reversed(checkpoint.all_snapshots(snapshot.parent)) if path < snapshot]


def _is_certified(path: Path) -> bool:
    trust = checkpoint.trust(path)
    return trust.state == "certified" and trust.witness is not None


def _stand_at(path: Path, stepper: Stepper, objectives: Mapping[str, Objective]) -> None:
    found = checkpoint.load(path)
    stepper.load(found.step, found.model, found.optimizer, None, objectives[found.phase])


def _replay(
    snapshot: Path, stepper: Stepper, referee: Accelerator, objectives: Mapping[str, Objective]
) -> Replayed:
    """Compute the recorded step, and its update, on the stepper's chip and hold both against the record and the referee."""
    trust = checkpoint.trust(snapshot)
    assert trust.witness is not None
    recorded = _as_proposal(
        checkpoint.read_witness(snapshot.parent / trust.witness, trust.witness_sha256)
    )
    assert stepper.objective is not None
    if recorded.phase != stepper.objective.phase:
        stepper.begin(objectives[recorded.phase])
    stepper.step = recorded.step - 1  # steps without anything to learn may lie between
    here = stepper.recompute(recorded.batch)
    found = NoiseFloor(referee).compare(here, recorded, stepper)
    detail = f"step {recorded.step}, {len(recorded.grads)} gradients and the loss ({here.loss:.6g}, recorded {recorded.loss:.6g}): {found.detail}"
    if not found.agrees:
        return Replayed(recorded.step, False, found.error, found.bound, detail)
    wrong = _wrong_update(recorded, stepper, referee)
    if wrong is not None:
        return Replayed(recorded.step, False, wrong.error, wrong.bound, f"{detail}; but {wrong}")
    return Replayed(recorded.step, True, found.error, found.bound, f"{detail}; its update too")


def _wrong_update(
    recorded: Proposal, stepper: Stepper, referee: Accelerator
) -> update.WrongUpdate | None:
    """The same gradients through both optimizers. The update's noise is measured only where it decides."""
    with stepper.aside():
        stepper.commit(replace(recorded, grads=stepper.accelerator.to_device(recorded.grads)))
        after = {name: tensor.detach().to("cpu", copy=True) for name, tensor in stepper.model_state().items()}  # fmt: skip
    wrong = None
    for measure in (False, True):
        expected = update.expect(recorded, stepper, referee, measure=measure)
        wrong = update.hold(expected, after)
        if wrong is None:
            break
    return wrong


def _told(found: list[Replayed]) -> Continuation:
    worst = max(found, key=lambda one: (not one.agrees, one.error / one.bound if one.bound else one.error))  # fmt: skip
    return Continuation(
        verified=all(one.agrees for one in found),
        steps=tuple(one.step for one in found),
        max_error=worst.error if math.isfinite(worst.error) else None,
        bound=worst.bound,
        detail="; ".join(one.detail for one in found),
    )


def _as_proposal(witness: checkpoint.Witness) -> Proposal:
    return Proposal(
        step=witness.batch.step,
        phase=witness.batch.phase,
        batch=witness.batch,
        loss=witness.loss,
        grad_norm=witness.grad_norm,
        tokens=0,
        seconds=0.0,
        grads=witness.grads,
        expert_loads=None,
        metrics={},
        learning_rate=0.0,
    )
