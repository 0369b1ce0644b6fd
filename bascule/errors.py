"""Every error bascule raises on purpose, and the exit code each one ends the program with.

    BasculeError                      1   our own fault, unless a kind below says otherwise
    ├── UsageError                    2   the command line or the recipe asks for something impossible
    │   ├── RecipeError                   a recipe key, value or combination is refused
    │   ├── LedgerError                   the run's ledger cannot be read (newer version, foreign file)
    │   ├── SnapshotError                 a snapshot is missing or does not match its hashes
    │   └── ModelFolderError              a Hugging Face folder cannot be read as one of our families
    ├── CheckFailed                   3   a check said no: doctor, qualify, an evaluation gate, --strict
    ├── GuardStopped                  4   the guard stopped the run and nothing can be moved
    │   └── RollbackNeeded                the chip erred once; go back to the last certified snapshot on the same pool
    ├── DeviceFault                   5   a chip failed and no pool is left
    │   ├── AcceleratorUnavailable        the accelerator asked for cannot be opened here
    │   ├── OperatorMissing               the chip lacks an operator the model needs
    │   ├── ChipCondemned                 the guard condemned this chip; carries the incident's id
    │   ├── ContinuationRefused           the new pool does not reproduce a recorded good step
    │   ├── RolloutFailed                 the rollout engine's chip failed while the trainer's own is in order
    │   ├── NonFiniteLogits               an engine's chip computed NaN or infinity where probabilities were asked
    │   └── NoPoolLeft                    the policy has no pool to go to
    ├── OutOfMemory                   6   host or device memory is exhausted
    └── Preempted                    75   stopped on request after a snapshot; run the same command again

A message says what was asked, what was found, what is allowed, and what to do, in that order and in one or two sentences.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class BasculeError(Exception):
    """Root of the tree. `exit_code` is the code the command line ends with."""

    exit_code = 1


class UsageError(BasculeError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class LedgerError(UsageError):
    pass


class SnapshotError(UsageError):
    pass


class ModelFolderError(UsageError):
    pass


class CheckFailed(BasculeError):
    exit_code = 3


class GuardStopped(BasculeError):
    exit_code = 4


class RollbackNeeded(GuardStopped):
    """A confirmed transient fault: steps since the last certified snapshot may be corrupt. The supervisor starts the same
    loop on the same pool from there; the proof lies in `incidents/<incident_id>/`."""

    def __init__(self, message: str, *, incident_id: str) -> None:
        super().__init__(message)
        self.incident_id = incident_id


class DeviceFault(BasculeError):
    exit_code = 5


class AcceleratorUnavailable(DeviceFault):
    pass


class OperatorMissing(DeviceFault):
    pass


class ChipCondemned(DeviceFault):
    """The guard has proof against the chip. The proof lies in `incidents/<incident_id>/`."""

    def __init__(self, message: str, *, incident_id: str) -> None:
        super().__init__(message)
        self.incident_id = incident_id


class ContinuationRefused(DeviceFault):
    pass


class RolloutFailed(DeviceFault):
    pass


class NonFiniteLogits(DeviceFault):
    pass


class NoPoolLeft(DeviceFault):
    pass


class OutOfMemory(BasculeError):
    exit_code = 6


class Preempted(BasculeError):
    exit_code = 75


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest allowed name, or an empty string."""
    found = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else ""
