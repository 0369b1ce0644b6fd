"""Is the run on this chip still the same run? The recorded good step is replayed here before anything continues.

Certification left a witness beside each certified snapshot: the step that followed it, with loss and every gradient, on which two
kinds of chip agreed. The new chip must compute the same from the snapshot's weights, within the noise measured on the referee
(guard/noise.NoiseFloor: the response to weights moved by one unit in the last place), tensor by tensor.
"""

from __future__ import annotations

import math
from pathlib import Path

from bascule.accelerators.base import Accelerator
from bascule.errors import ContinuationRefused
from bascule.guard.noise import NoiseFloor
from bascule.ledger import Ledger
from bascule.records import Continuation
from bascule.train import checkpoint
from bascule.train.step import Proposal, Stepper


def prove(
    snapshot: Path, stepper: Stepper, referee: Accelerator, ledger: Ledger
) -> Continuation | None:
    """Replay the witness of `snapshot`, which `stepper` has just loaded; record the answer.

    Returns None, with a warning in the ledger, when the snapshot has no witness (it was never certified). Raises
    ContinuationRefused when this chip computes something else, and SnapshotError when the witness is damaged.
    """
    trust = checkpoint.trust(snapshot)
    if trust.witness is None:
        ledger.warn(
            "continuation not verified",
            f"{snapshot.name} is {trust.state} and has no witness; only its hashes were checked",
        )
        return None
    found = hold(snapshot.parent / trust.witness, trust.witness_sha256, stepper, referee)
    ledger.append(found)
    if not found.verified:
        raise ContinuationRefused(
            f"{stepper.accelerator.name} does not continue the run from {snapshot.name}: {found.detail}. The pool is left; "
            f"qualify it (bascule qualify) before it trains again."
        )
    return found


def hold(
    witness_file: Path, sha256: str | None, stepper: Stepper, referee: Accelerator
) -> Continuation:
    """Compute the recorded step on the stepper's chip and hold it against the record."""
    recorded = _as_proposal(checkpoint.read_witness(witness_file, sha256))
    here = stepper.recompute(recorded.batch)
    found = NoiseFloor(referee).compare(here, recorded, stepper)
    return Continuation(
        verified=found.agrees,
        steps=(recorded.step,),
        max_error=found.error if math.isfinite(found.error) else None,
        bound=found.bound,
        detail=f"step {recorded.step}, {len(recorded.grads)} gradients and the loss ({here.loss:.6g}, recorded {recorded.loss:.6g}): {found.detail}",
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
