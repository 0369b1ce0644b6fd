"""The runtime: operators that do not exist, exceptions the device reports, processes that die."""

from __future__ import annotations

import os
import signal

import torch

from bascule.errors import OperatorMissing
from bascule.faults.fault import Call, Fault, Touched


class MissingOperator(Fault):
    on_operands = True
    fatal = True

    def before(self, call: Call, index: int) -> Touched | None:
        raise OperatorMissing(
            f"The operator {call.name} is not implemented on this simulated chip ({call.direction} pass). Use another pool for this role, or a model that does not need it."
        )


class ProcessDeath(Fault):
    """SIGKILL to the own process: no handler runs, no file is flushed, as when a chip falls off the bus or a node goes."""

    on_operands = True
    fatal = True

    def before(self, call: Call, index: int) -> Touched | None:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process does not reach this line")


class DeviceError(Fault):
    """The code is that of Ascend's aicore exceptions in public bug reports (507015)."""

    on_operands = True
    fatal = True

    def before(self, call: Call, index: int) -> Touched | None:
        raise torch.AcceleratorError(
            f"simulated chip: aicore exception in {call.op}, error code is 507015"
        )
