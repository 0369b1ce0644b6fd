"""A mode that sees every operator PyTorch runs. Faults act in one, checksums and the search for a wrong operator watch from one."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):  # type: ignore[misc,no-untyped-call]
    """PyTorch wraps a mode's `__torch_dispatch__` so that its compiler stays out; the first call then imports the compiler, which takes
    every worker two seconds, and each later one passes two more Python frames. Nothing is compiled under our modes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
